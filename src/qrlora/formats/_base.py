"""Dense base weights for files that mean a difference from them."""

from pathlib import Path

from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._layout import WeightSource
from qrlora.formats._safetensors import read_contents, read_tensors

_SUBFOLDERS = ("transformer", "unet", ".")
_FLOATING = ("F64", "F32", "F16", "BF16")


def weight_source(model: str | Path) -> WeightSource:
    """The weights of a denoiser saved by diffusers, read one at a time.

    Args:
        model: a pipeline's folder, its denoiser's folder, or one `.safetensors` file with diffusers' names.

    Returns:
        A function from a layer's module path to its weight, on the CPU, as it is stored.

    Raises:
        QrloraError: no such folder or file, or no safetensors in it; the function: a layer that is not there, or is
            quantised.
    """
    root = Path(model)
    places: dict[str, Path] = {}
    packed: set[str] = set()
    for file in _files(root):
        for key, entry in read_contents(file).entries.items():
            if key.endswith(".weight") and key not in places:
                places[key] = file
                packed |= {key} if entry.dtype not in _FLOATING else set()

    def weight(layer: str) -> Tensor:
        key = f"{layer}.weight"
        if key not in places:
            raise QrloraError(f"{root} has no layer {layer}; give the base model that the adapter was trained on.")
        if key in packed:
            raise QrloraError(f"{root}: {key} is quantised; give the base model in float32, bfloat16 or float16.")
        return read_tensors(places[key], [key])[key]

    return weight


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    for folder in (root / name for name in _SUBFOLDERS):
        found = sorted(folder.glob("*.safetensors"), key=_variants_last)
        if found:
            return found
    raise QrloraError(f"{root} is no diffusers model: there is no .safetensors in it, nor in transformer or unet.")


def _variants_last(path: Path) -> tuple[bool, str]:
    """`diffusion_pytorch_model.fp16.safetensors` only where the full one is not there."""
    return ".fp16" in path.suffixes or ".bf16" in path.suffixes, path.name
