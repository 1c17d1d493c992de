"""`qrlora basis`: fill the cache of bases."""

import time
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qrlora.cli._options import parse_options, say
from qrlora.errors import QrloraError


class BasisOptions(BaseModel):
    """Compute the basis of every adapted layer of a model and keep them for all later trainings at this rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    """Hub id or local diffusers folder; none means the embedded base."""
    rank: int = Field(default=64, gt=0)
    basis: str = "qr"
    """qr, svd, minor, random, ica."""
    side: Literal["output", "input"] = "output"
    solver: Literal["auto", "exact", "gram", "krylov"] = "auto"
    target_modules: tuple[str, ...] = ("auto",)
    """auto, one regular expression for whole paths, or several names of layers."""
    seed: int = 0
    """Of the random basis."""
    quantization: Literal["nf4", "int8", "fp8"] | None = None
    """Of the weights that the trainings will load: their bases are others."""
    device: str | None = None
    """Where to compute; none means the best that is there."""


def run(arguments: Sequence[str]) -> None:
    """Parse, compute, and say where the entries are."""
    options = parse_options(BasisOptions, "basis", arguments)
    if options.basis == "lora":
        raise QrloraError("--basis lora has no basis to compute: plain LoRA trains both factors; choose qr or another.")
    from qrlora import starter
    from qrlora.adapter import AdapterSpec, BasisCache, add_adapter, basis_notice
    from qrlora.blend import choose_place
    from qrlora.models import load_pipeline

    targets = list(options.target_modules)
    spec = AdapterSpec(
        rank=options.rank,
        basis=options.basis,
        side=options.side,
        solver=options.solver,
        seed=options.seed,
        target_modules=targets if len(targets) > 1 else targets[0],
    )
    device, dtype = choose_place(options.device)
    loaded = load_pipeline(
        options.model or starter.path(), dtype=dtype, quantization=options.quantization, denoiser=False
    )
    loaded.release_encoders()
    loaded.load_denoiser(device)
    denoiser = loaded.denoiser
    cache, started, shown = BasisCache(), time.perf_counter(), time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if time.perf_counter() - shown > 15:
            shown = time.perf_counter()
            say(f"{done}/{total} layers, {(shown - started) / done * (total - done):.0f} s left")

    notice = basis_notice(denoiser, spec, cache=cache)
    if notice is not None:
        say(notice)
    layers = add_adapter(denoiser, spec, "basis", cache=cache, progress=progress)
    say(f"{len(layers)} bases of rank {spec.rank} in {time.perf_counter() - started:.1f} s")
    print(cache.folder)
