"""One door for every adapter that can be read."""

import warnings
from pathlib import Path

from qrlora.errors import QrloraWarning
from qrlora.formats._adapter import Adapter
from qrlora.formats._import import import_adapter
from qrlora.formats._layout import WeightSource


def read_adapter(
    path: str | Path,
    *,
    layout: str | None = None,
    basis: str | None = None,
    base: WeightSource | None = None,
    lora_alpha: float | None = None,
    top_k: int | None = None,
    allow_unmatched: bool = False,
    lazy: bool = False,
) -> Adapter:
    """Read an adapter of any known layout: ours, diffusers', peft's, kohya's, ComfyUI's, the published code's.

    The arguments are those of `import_adapter`, which gives an account of every key too. With `allow_unmatched`, a
    `QrloraWarning` says how many keys were left out.

    Raises:
        QrloraError: nothing there, or what is there is truncated, not finite, of an unknown layout or of absurd size,
            with keys that are not understood or without something it needs; the sentence names the file and the key.
    """
    imported = import_adapter(
        path,
        layout=layout,
        basis=basis,
        base=base,
        lora_alpha=lora_alpha,
        top_k=top_k,
        allow_unmatched=allow_unmatched,
        lazy=lazy,
    )
    if imported.recognised.unmatched:
        left_out = len(imported.recognised.unmatched)
        warnings.warn(f"{path}: {left_out} keys are not understood and left out.", QrloraWarning, stacklevel=2)
    return imported.adapter
