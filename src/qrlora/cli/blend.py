"""`qrlora blend`: the whole job."""

from collections.abc import Sequence

from qrlora.blend import BlendConfig
from qrlora.cli._options import parse_options, say


def run(arguments: Sequence[str]) -> None:
    """Parse, blend, and say where things are."""
    config = parse_options(BlendConfig, "blend", arguments)
    from qrlora.blend import blend

    result = blend(config)
    spent = ", ".join(f"{phase} {seconds:g} s" for phase, seconds in result.seconds.items())
    say(f"done ({spent})")
    for path in (result.sheet, result.sweep, result.content, result.style, result.merged, result.report):
        if path is not None:
            print(path)
