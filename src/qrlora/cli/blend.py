"""`qrlora blend`: the whole job."""

from collections.abc import Sequence

from qrlora.blend import BlendConfig
from qrlora.cli._options import parse_options, say


def run(arguments: Sequence[str]) -> None:
    """Parse, blend, and say where things are."""
    config = parse_options(BlendConfig, "blend", arguments)
    from qrlora.blend import blend
    from qrlora.training import Interrupted

    try:
        result = blend(config)
    except Interrupted as stop:
        instead = " instead of --overwrite" if config.overwrite else ""
        way_on = f"run the same command with --resume{instead} to continue"
        stop.args = (f"stopped at step {stop.step}; saved in {stop.checkpoint}; {way_on}.",)
        raise
    spent = ", ".join(f"{phase} {seconds:g} s" for phase, seconds in result.seconds.items())
    say(f"done ({spent})")
    for path in (result.sheet, result.sweep, result.content, result.style, result.merged, result.report):
        if path is not None:
            print(path)
