"""`qrlora export`: an adapter file of any tool, written for another one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from qrlora.cli._files import FileOptions, base_weights
from qrlora.cli._options import parse_options, refuse_existing, say
from qrlora.errors import QrloraError


class ExportOptions(FileOptions):
    """Write an adapter file, ours or another tool's, in the layout of another tool.

    Its updates stay as they are, unless a --rank is given.
    """

    file: Annotated[Path, tyro.conf.Positional]
    """Adapter file, peft folder, or a folder that diffusers saved to."""
    output: Path
    """The new file, ending in .safetensors; for peft, the new folder."""
    format: Literal["diffusers", "peft", "kohya", "comfy", "own"] = "diffusers"
    """diffusers (ComfyUI reads it too), peft (a folder), kohya, comfy (ComfyUI's keys with the original names), or own
    (qrlora alone reads it: gated adapters, which are no LoRA)."""
    family: str | None = None
    """For kohya and comfy: the model's family (flux, flux2, qwen-image, sd15, sd3, sdxl or z-image), where the layers
    do not tell it."""
    rank: int | None = Field(default=None, gt=0)
    """Bring every layer to at most this rank (truncated SVD); the relative error is told."""
    save_dtype: Literal["fp32", "bf16"] = "fp32"
    allow_unmatched: bool = False
    """Leave out keys that are not understood (T5 encoders, biases...) instead of refusing the file."""
    overwrite: bool = False
    """Replace the output."""


def run(arguments: Sequence[str]) -> None:
    """Parse, convert, and give an account of the keys."""
    options = parse_options(ExportOptions, "export", arguments)
    folder = options.format == "peft"
    if not folder and options.output.suffix != ".safetensors":
        raise QrloraError(f"--output {options.output} must end in .safetensors.")
    if folder and (options.output.suffix == ".safetensors" or options.output.is_file()):
        raise QrloraError(f"--output {options.output} must be a folder, as a peft adapter is one.")
    refuse_existing(options.output, options.overwrite)
    from qrlora.formats import import_adapter, shown, write_adapter
    from qrlora.formats.keys import table_of

    if options.family is not None:
        table_of(options.family)
    imported = import_adapter(
        options.file,
        layout=options.layout,
        basis=options.basis,
        base=base_weights(options.model),
        lora_alpha=options.lora_alpha,
        top_k=options.top_k,
        allow_unmatched=options.allow_unmatched,
        lazy=True,
    )
    adapter, recognised = imported.adapter, imported.recognised
    if options.rank is not None:
        from qrlora.merging import refactor

        adapter, error = refactor(adapter, options.rank)
        say(f"brought to rank {options.rank}: relative error {error:.3g} of the whole update")
    write_adapter(adapter, options.output, options.format, save_dtype=options.save_dtype, family=options.family)
    say(f"read as {recognised.layout.title}: {recognised.evidence}")
    layers = sum(len(part.layers) for part in adapter.components.values())
    say(f"{len(recognised.matched)} keys matched, {len(recognised.unmatched)} left out, {layers} layers")
    for key in recognised.unmatched:
        say(f"left out: {shown(key)}")
    print(options.output)
