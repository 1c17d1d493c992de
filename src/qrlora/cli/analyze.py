"""`qrlora analyze`: how adapters relate, as a report."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field

from qrlora.cli._options import parse_options, refuse_existing, say

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
    """The adapters' base, for R = Q^T W: hub id, local diffusers folder, or "embedded"; none leaves R out."""
    usage: tuple[Path, ...] = ()
    """Recorded expert usage of gated adapters (JSON)."""
    seed: int = 0
    """Of the random baseline."""
    draws: int = Field(default=32, gt=1)
    """Random pairs for each shape."""
    overwrite: bool = False
    """Write into the folder though it is there."""


def run(arguments: Sequence[str]) -> None:
    """Parse, analyze, and say where the report is."""
    options = parse_options(AnalyzeOptions, "analyze", arguments)
    refuse_existing(options.output, options.overwrite)
    from qrlora import starter
    from qrlora.analysis import ExpertUsage, analyze, write_report
    from qrlora.formats import read_adapter
    from qrlora.models import load_pipeline

    adapters = [read_adapter(path) for path in options.adapters]
    usages = [ExpertUsage.read(path) for path in options.usage]
    denoiser = None
    if options.model is not None:
        denoiser = load_pipeline(starter.path() if options.model == EMBEDDED else options.model).denoiser
    started = shown = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if time.perf_counter() - shown > 15:
            shown = time.perf_counter()
            say(f"{done}/{total} layers, {(shown - started) / done * (total - done):.0f} s left")

    report = analyze(
        adapters, denoiser=denoiser, usages=usages, seed=options.seed, draws=options.draws, progress=progress
    )
    page = write_report(report, options.output)
    say(f"{len(adapters)} adapters, {len(report.pairs)} pairs, {time.perf_counter() - started:.1f} s")
    print(page)
