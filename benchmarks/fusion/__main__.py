"""Command line: see the package's docstring."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fusion.stages import STAGES, Options
from qrlora.errors import QrloraError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; bad input is told in one sentence."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", type=Path, default=Path("data/emoji.npz"), help="of tools.emoji.build")
    parser.add_argument("--work", type=Path, default=Path("data/fusion"), help="where all that is computed is kept")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/fusion"))
    parser.add_argument("--size", default=None, help="an entry of stages.json; the stage's own name if none")
    parser.add_argument("--methods", nargs="+", default=None, help="entries of methods.json; all of the main group")
    parser.add_argument("--merges", nargs="+", default=None, help="entries of merges.json; all")
    parser.add_argument("--best", type=int, default=4, help="how many methods go on from a screen")
    parser.add_argument("--contents", type=int, default=None, help="fewer contents than the stage has")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="other seeds than the stage's")
    parser.add_argument("--cached", action="store_true", help="compute nothing; report what is there")
    args = parser.parse_args(arguments)
    values = vars(args)
    stage = STAGES[values.pop("stage")]
    try:
        stage(Options(**values, command=" ".join(["python -m benchmarks.fusion", *(arguments or sys.argv[1:])])))
    except QrloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was computed is kept.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
