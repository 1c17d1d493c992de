"""`qrlora analyze`: how adapters relate, as a report."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict, Field

from qrlora.cli._options import parse_options, refuse_existing, say
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.blend import DrawnUsage
    from qrlora.formats import Adapter

EMBEDDED = "embedded"


class AnalyzeOptions(BaseModel):
    """Compare adapter files, of any tool: similarity, angles, norms, each beside what random matrices give.

    The folder holds report.html (by itself: pictures are in it), the pictures, and all numbers in report.json.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapters: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Adapter files or peft folders; one alone is described by itself."""
    output: Path
    """The report's folder."""
    model: str | None = None
    """The adapters' base, for R = Q^T W and the expert usage of gated adapters: hub id, local diffusers folder, or
    "embedded"; none leaves both out."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What --model draws to see which experts gated adapters use; may be given several times. None: the captions they
    were trained with."""
    device: str | None = None
    """Where it draws: cpu, cuda, mps...; none means the best that is there."""
    usage: tuple[Path, ...] = ()
    """Expert usage of gated adapters that was recorded before (JSON)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the random baseline, and of the pictures."""
    draws: int = Field(default=32, gt=1)
    """Random pairs for each shape."""
    overwrite: bool = False
    """Write into the folder though it is there."""


def run(arguments: Sequence[str]) -> None:
    """Parse, draw where that is wanted, analyze, and say where the report is."""
    options = parse_options(AnalyzeOptions, "analyze", arguments)
    refuse_existing(options.output, options.overwrite)
    if options.prompt and options.model is None:
        raise QrloraError(
            "--prompt is what the base model draws to see which experts are used; add --model (--model embedded for "
            "the embedded one), or drop it."
        )
    from qrlora.analysis import ExpertUsage, adapter_names, analyze, write_report
    from qrlora.formats import read_adapter

    adapters = [read_adapter(path) for path in options.adapters]
    names = adapter_names(adapters)
    usages = [ExpertUsage.read(path) for path in options.usage]
    denoiser, drawn = _drawn(options, names, adapters, [usage.name for usage in usages])
    started = shown = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if time.perf_counter() - shown > 15:
            shown = time.perf_counter()
            say(f"{done}/{total} layers, {(shown - started) / done * (total - done):.0f} s left")

    report = analyze(
        adapters,
        names=names,
        denoiser=denoiser,
        usages=[*usages, *(drawn.usages if drawn is not None else ())],
        seed=options.seed,
        draws=options.draws,
        progress=progress,
    )
    if drawn is not None:
        drawn.write(options.output)
    page = write_report(report, options.output)
    say(f"{len(adapters)} adapters, {len(report.pairs)} pairs, {time.perf_counter() - started:.1f} s")
    print(page)


def _drawn(
    options: AnalyzeOptions, names: Sequence[str], adapters: Sequence["Adapter"], taken: Sequence[str]
) -> tuple[Any, "DrawnUsage | None"]:
    """The base's denoiser, and what it drew with the gated adapters, whose usages get names that are not taken."""
    from qrlora.adapter import is_gated

    gated = {name: index for index, name in enumerate(names) if is_gated(adapters[index])}
    if options.prompt and not gated:
        raise QrloraError(
            f"--prompt is for gated adapters, which use experts, and none of {', '.join(names)} is gated; drop it."
        )
    if options.model is None:
        return None, None
    from qrlora import starter
    from qrlora.analysis import numbered
    from qrlora.blend import draw_usage, load_painter, trained_captions
    from qrlora.models import load_pipeline

    model = None if options.model == EMBEDDED else options.model
    prompts = list(dict.fromkeys(options.prompt)) or trained_captions(*(adapters[index] for index in gated.values()))
    if not prompts:
        if gated:
            say(f"expert usage is left out: {', '.join(gated)} name no captions to draw, so give --prompt")
        return load_pipeline(model or starter.path()).denoiser, None
    painter = load_painter(model, options.device)
    count = "1 picture" if len(prompts) == 1 else f"{len(prompts)} pictures"
    say(f"drawing {count} with {', '.join(gated)} to see which experts they use")
    files = [options.adapters[index] for index in gated.values()]
    named = zip(numbered([*taken, *gated])[len(taken) :], files, strict=True)
    return painter.loaded.denoiser, draw_usage(painter, dict(named), prompts, options.seed)
