"""One door for every layout that can be written."""

from pathlib import Path

from qrlora.errors import QrloraError
from qrlora.formats._adapter import Adapter, SaveDtype
from qrlora.formats._layout import WritableLayout, WriteOptions, format_names, layout_named


def write_adapter(
    adapter: Adapter,
    path: str | Path,
    format: str = "diffusers",
    *,
    save_dtype: SaveDtype = "fp32",
    family: str | None = None,
) -> Path:
    """Write an adapter for another tool; exact, but for `save_dtype`.

    Args:
        adapter: a low-rank adapter (or, for "own", one that is more); its header goes along, and other tools ignore it.
        path: the file, ending in .safetensors; for peft, the folder.
        format: "diffusers", "peft", "kohya", "comfy"; or "own" for gated adapters, which no other tool knows.
        save_dtype: "fp32" or "bf16".
        family: for kohya and comfy, whose names depend on the model: "flux", "sd3"...; by the layers where None.

    Returns:
        `path`.

    Raises:
        QrloraError: an unknown format, an adapter that is more than a LoRA, a layer without a name in that format,
            values that are not finite, or nothing can be written.
    """
    if format not in format_names():
        raise QrloraError(f"format {format!r} cannot be written; use one of {', '.join(format_names())}.")
    layout = layout_named(format)
    assert isinstance(layout, WritableLayout)  # format_names lists only these
    return layout.write(adapter, path, WriteOptions(save_dtype, family))
