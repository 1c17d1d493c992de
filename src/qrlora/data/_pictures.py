"""One picture file: read with bounds, upright, on white, its alpha kept as a mask."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from qrlora.errors import QrloraError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 64 * 2**20
"""Checked against the file's header, before anything is decoded."""
MAX_FILE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Picture:
    """`rgb` on white, upright; `mask` (mode `L`, same size) where the file has transparency, else None."""

    rgb: Image.Image
    mask: Image.Image | None


def open_picture(path: str | Path) -> Picture:
    """Decode the first frame of a picture file.

    Raises:
        QrloraError: no file, not a picture of a known format, truncated, or above `MAX_PIXELS` or `MAX_FILE_BYTES`.
    """
    path = Path(path)
    image = _decode(path)
    if not image.has_transparency_data:
        return Picture(_eight_bit(image).convert("RGB"), None)
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return Picture(rgba.convert("RGB"), None)
    white = Image.new("RGBA", rgba.size, "white")
    return Picture(Image.alpha_composite(white, rgba).convert("RGB"), alpha)


def open_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """A mask picture, white where the loss counts; `size` is that of the upright picture it belongs to."""
    mask = _eight_bit(_decode(path)).convert("L")
    if mask.size != size:
        raise QrloraError(
            f"{path} is {_size(mask.size)}, but its picture is {_size(size)}; a mask has its picture's size."
        )
    return mask


def square(image: Image.Image, resolution: int) -> Image.Image:
    """The centred square, resampled once (Lanczos) to `resolution` x `resolution` pixels.

    Cropping comes first, so that a very long picture never becomes a very large one.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    centre = image.crop((left, top, left + side, top + side))
    return centre.resize((resolution, resolution), Image.Resampling.LANCZOS)


def _decode(path: Path) -> Image.Image:
    if not path.is_file():
        raise QrloraError(f"there is no picture {path}.")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise QrloraError(
            f"{path} has {size / 2**20:.0f} MiB, above the limit of {MAX_FILE_BYTES // 2**20} MiB; shrink it."
        )
    try:
        with warnings.catch_warnings():
            # Pillow's own size warning would come before the check below, which is stricter and names the file.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _too_large(path, _size(image.size))
                image.load()
                return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise _too_large(path, "far larger") from error
    except QrloraError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        detail = "it is not one of " + ", ".join(FORMATS) if isinstance(error, Image.UnidentifiedImageError) else detail
        raise QrloraError(f"{path} is no readable picture ({detail}); replace or remove it.") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey to white when it converts; scale instead."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64) / 257.0
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8), mode=None)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


def _too_large(path: Path, size: str) -> QrloraError:
    return QrloraError(f"{path} is {size}, above the limit of {MAX_PIXELS // 2**20} million pixels; scale it down.")
