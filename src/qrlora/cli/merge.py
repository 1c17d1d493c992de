"""`qrlora merge`: adapters into one adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict

from qrlora.cli._options import parse_options, refuse_existing, say
from qrlora.errors import QrloraError


class MergeOptions(BaseModel):
    """Merge adapter files of one base model: the sum of their updates, each times its weight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapters: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Adapter files or peft folders."""
    output: Path
    """The merged file, ending in .safetensors; or a folder, for a peft folder."""
    weights: tuple[float, ...] = ()
    """One an adapter; all 1 where not given."""
    method: str = "auto"
    """auto (sum on one stored basis, else concat), sum, concat..."""
    save_dtype: Literal["fp32", "bf16"] = "fp32"
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
    from qrlora.formats import read_adapter, write_peft_folder
    from qrlora.merging import merge

    merged = merge([read_adapter(path) for path in options.adapters], options.weights or None, options.method)
    if as_file:
        merged.save(options.output, save_dtype=options.save_dtype)
    else:
        write_peft_folder(merged, options.output, save_dtype=options.save_dtype)
    rank = max(pair.rank for pair in merged.layers.values())
    method = merged.header.method if merged.header is not None else options.method
    say(f"{len(options.adapters)} adapters merged by {method}: rank {rank}, {len(merged.layers)} layers")
    print(options.output)
