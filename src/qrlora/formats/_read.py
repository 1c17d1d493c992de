"""One door for every adapter that can be read as it is."""

from pathlib import Path

from qrlora.errors import QrloraError
from qrlora.formats._adapter import Adapter
from qrlora.formats._coefficients import is_coefficients
from qrlora.formats._native import read_native
from qrlora.formats._peft_folder import CONFIG_NAME, read_peft_folder
from qrlora.formats._safetensors import read_metadata

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter: a diffusers LoRA file (ours or another tool's), a peft folder, or a folder diffusers saved to.

    Raises:
        QrloraError: nothing there, or what is there is truncated, not finite, of an unknown layout or of absurd size;
            the sentence names the file and the key.
    """
    source = Path(path)
    if source.is_dir():
        if (source / CONFIG_NAME).is_file():
            return read_peft_folder(source)
        if (source / DIFFUSERS_NAME).is_file():
            return read_native(source / DIFFUSERS_NAME)
        raise QrloraError(
            f"{source} is a folder with neither {CONFIG_NAME} (peft) nor {DIFFUSERS_NAME} (diffusers) in it."
        )
    if is_coefficients(read_metadata(source)):
        raise QrloraError(
            f"{source} holds coefficients only, which need their base model: qrlora merge {source} --model MODEL "
            "--output FILE makes it whole (in Python, qrlora.adapter.resolve_coefficients)."
        )
    return read_native(source)
