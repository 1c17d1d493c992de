"""`qrlora merge`: adapters into one adapter."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict

from qrlora.cli._options import method_options, parse_options, refuse_existing, say
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    import torch

    from qrlora.formats import Adapter


class MergeOptions(BaseModel):
    """Merge adapter files of one base model: the sum of their updates, each times its weight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapters: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Adapter files or peft folders; a file of coefficients alone is made whole on its base model first."""
    output: Path
    """The merged file, ending in .safetensors; or a folder, for a peft folder."""
    weights: tuple[float, ...] = ()
    """One an adapter; all 1 where not given."""
    method: str = "auto"
    """auto (sum on one stored basis, else concat), sum, concat, svd, ties, dare, knots, orthogonal, lego, do, zip
    (which learns on the base model)..."""
    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE of the method, such as density=0.3; may be given several times."""
    blocks: tuple[str, ...] = ()
    """Which part of each adapter is meant, one an adapter: all, a preset (b-lora-content, splitflux-style...), a range
    such as single_transformer_blocks.10-37, or a regular expression for the beginning of layer paths."""
    normalize: bool = False
    """First scale every adapter to the geometric mean of their norms, so that the weights alone say how strong each
    is."""
    save_dtype: Literal["fp32", "bf16"] = "fp32"
    model: str | None = None
    """Hub id or local diffusers folder: the base model, for method zip and for files that hold coefficients only; not
    needed otherwise. None means what the files name, where that is the embedded base or a folder that is here."""
    device: str | None = None
    """Where the base model computes, for method zip: cpu, cuda, mps...; none means the best that is there."""
    memory: Literal["6gb", "8gb", "12gb", "16gb", "24gb", "max"] | None = None
    """For a card of that size, for method zip; see `qrlora train`."""
    overwrite: bool = False
    """Replace the output file."""


def run(arguments: Sequence[str]) -> None:
    """Parse, merge, and say how it was done."""
    options = parse_options(MergeOptions, "merge", arguments)
    as_file = options.output.suffix == ".safetensors"
    if options.output.suffix and not as_file and not options.output.is_dir():
        refuse_existing(options.output, overwrite=False)
        raise QrloraError(
            f"--output {options.output} must end in .safetensors, or be a folder's name without a suffix."
        )
    refuse_existing(options.output, options.overwrite)
    from qrlora.merging import norm_ratio

    merged = _merged(options, as_file)
    rank = merged.rank
    method = merged.header.method if merged.header is not None else options.method
    words = "".join(f", {len(part.layers)} of the {name}" for name, part in merged.companions.items())
    say(f"{len(options.adapters)} adapters merged by {method}: rank {rank}, {len(merged.layers)} layers{words}")
    parts = merged.header.merged_from or [] if merged.header is not None else []
    sizes = [abs(part["weight"]) * part["norm"] * part.get("scale", 1.0) for part in parts]
    ratio = norm_ratio(sizes)
    if ratio is not None:
        listed = ", ".join(f"{path} {size:.4g}" for path, size in zip(options.adapters, sizes, strict=True))
        say(f"norm times weight: {listed}; ratio {ratio:.3g}")
    print(options.output)


def _merged(options: MergeOptions, as_file: bool) -> "Adapter":
    """Merge and write."""
    from qrlora.formats import write_peft_folder
    from qrlora.merging import merge, merge_to_file

    given = method_options(options.option)
    for name in given.keys() & {*signature(merge_to_file).parameters, "progress"}:
        raise QrloraError(f"--option {name}: no merge method has that option.")
    adapters = _read(options)
    with _learning(options, adapters, given) as extra:
        asked = {
            "weights": options.weights or None,
            "method": options.method,
            "blocks": options.blocks or None,
            "normalize": options.normalize,
            **given,
            **extra,
        }
        if as_file:
            return merge_to_file(adapters, options.output, save_dtype=options.save_dtype, **asked)
        merged = merge(adapters, **asked)
    write_peft_folder(merged, options.output, save_dtype=options.save_dtype)
    return merged


@contextmanager
def _learning(
    options: MergeOptions, adapters: "Sequence[Adapter]", given: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What a method needs that learns on the base model; nothing for others."""
    from qrlora.merging import merge_options

    if "model" not in merge_options(options.method):
        for name in ("device", "memory"):
            if getattr(options, name) is not None:
                raise QrloraError(f"--{name} is for methods that learn on the base model, such as zip; drop it.")
        yield {}
        return
    from qrlora.blend import choose_place
    from qrlora.training import load_for
    from qrlora.training.progress import ProgressReport

    extra: dict[str, Any] = {}
    if "model" not in given:
        header = adapters[0].header
        named = header.base_model if header is not None else None
        name = options.model or _base_named(f"method {options.method} learns on the base model", named)
        device, dtype = choose_place(options.device)
        extra["model"] = load_for(options.memory, name, dtype=dtype, device=device)
    report: ProgressReport | None = None

    def progress(done: int, total: int, loss: float) -> None:
        nonlocal report
        report = report or ProgressReport(options.method, total, done=done - 1).start()
        if report.due(done):
            report.show(done, f"loss {loss:.4f}")

    try:
        yield {**extra, "progress": progress}
    finally:
        if report is not None:
            report.close()


def _read(options: MergeOptions) -> "list[Adapter]":
    """The adapters; the base models that coefficients alone need are loaded once each, in their own precision."""
    from qrlora.adapter import resolve_coefficients
    from qrlora.formats import is_coefficients, read_adapter, read_coefficients, read_metadata
    from qrlora.models import LoadedModel, load_pipeline

    found: list[Adapter] = []
    bases: dict[tuple[str, torch.dtype], LoadedModel] = {}
    for path in options.adapters:
        if path.is_dir() or not is_coefficients(read_metadata(path)):
            found.append(read_adapter(path, lazy=True))
            continue
        file = read_coefficients(path)
        why = f"{path} holds coefficients only, which need their base model"
        key = options.model or _base_named(why, file.header.base_model), _precision(path, file.header.weight_hashes)
        if key not in bases:
            bases[key] = load_pipeline(key[0], dtype=key[1])
        say(f"{path}: its bases are computed again on {bases[key].model_id}")
        found.append(resolve_coefficients(file, bases[key].denoiser))
    return found


def _base_named(why: str, name: str | None) -> str:
    """The embedded base or a folder that is here; a file may be anybody's, so it alone has nothing downloaded."""
    from qrlora import starter
    from qrlora.models import read_settings

    if name is not None and Path(name).is_dir():
        return name
    if name is not None and name == read_settings(starter.path()).name:
        return str(starter.path())
    named = f" ({name!r} by its header)" if name is not None else ""
    raise QrloraError(f"{why}{named}; give it with --model.")


def _precision(path: Path, weight_hashes: Mapping[str, str]) -> "torch.dtype":
    """That of the base weights the adapter was trained on: another one has other bases."""
    import torch

    label = next(iter(weight_hashes.values()), "").partition(":")[0]
    if label.startswith("packed-"):
        raise QrloraError(
            f"{path} holds coefficients trained on a quantised base ({label}); make it whole in Python, with "
            "qrlora.adapter.resolve_coefficients on that base."
        )
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(label, torch.float32)
