"""One picture file: read with bounds, upright, on white, its alpha kept as a mask."""

import io
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
    """`rgb` on white, upright; `mask` (mode `L`, same size) where there is one or the file has transparency, else None;
    `mask_name` is what sentences call the mask."""

    rgb: Image.Image
    mask: Image.Image | None
    mask_name: str = ""


def open_picture(path: str | Path) -> Picture:
    """Decode the first frame of a picture file.

    Raises:
        QrloraError: no file, not a picture of a known format, truncated, or above `MAX_PIXELS` or `MAX_FILE_BYTES`.
    """
    return _on_white(_open(Path(path)), str(path))


def decode_picture(content: bytes, name: str) -> Picture:
    """The same for a picture in memory, which sentences call `name`.

    Raises:
        QrloraError: as `open_picture`.
    """
    return _on_white(_decode(io.BytesIO(content), len(content), name), name)


def _on_white(image: Image.Image, name: str) -> Picture:
    if not image.has_transparency_data:
        return Picture(_eight_bit(image).convert("RGB"), None)
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return Picture(rgba.convert("RGB"), None)
    white = Image.new("RGBA", rgba.size, "white")
    return Picture(Image.alpha_composite(white, rgba).convert("RGB"), alpha, name)


def open_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """A mask picture, white where the loss counts; `size` is that of the upright picture it belongs to."""
    mask = _eight_bit(_open(path)).convert("L")
    if mask.size != size:
        raise QrloraError(
            f"{path} is {_size(mask.size)}, but its picture is {_size(size)}; a mask has its picture's size."
        )
    return mask


@dataclass(frozen=True)
class Window:
    """What is cut out of a picture, in its pixels, and the `target` (height, width) that it is resampled to."""

    left: int
    top: int
    width: int
    height: int
    target: tuple[int, int]

    def cut(self, image: Image.Image) -> Image.Image:
        """Cut, then resample once (Lanczos).

        Cutting comes first, so that a very long picture never becomes a very large one.
        """
        part = image.crop((self.left, self.top, self.left + self.width, self.top + self.height))
        height, width = self.target
        return part.resize((width, height), Image.Resampling.LANCZOS)


def window(size: tuple[int, int], target: tuple[int, int], at: tuple[float, float] | None = None) -> Window:
    """The largest window of the target's ratio.

    Args:
        size: width and height of the picture, as Pillow has them.
        target: height and width in pixels.
        at: how much of the room lies left of it and above it, each in [0, 1); None is the centre.
    """
    (width, height), (target_height, target_width) = size, target
    across = max(1, min(width, (height * target_width + target_height // 2) // target_height))
    down = max(1, min(height, (width * target_height + target_width // 2) // target_width))
    left, top = (width - across) // 2, (height - down) // 2
    if at is not None:
        left, top = int(at[0] * (width - across + 1)), int(at[1] * (height - down + 1))
    return Window(left, top, across, down, target)


def square(image: Image.Image, resolution: int) -> Image.Image:
    """The centred square, resampled to `resolution` x `resolution` pixels."""
    return window(image.size, (resolution, resolution)).cut(image)


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise QrloraError(f"there is no picture {path}.")
    return _decode(path, path.stat().st_size, str(path))


def _decode(source: Path | io.BytesIO, size: int, name: str) -> Image.Image:
    if size > MAX_FILE_BYTES:
        raise QrloraError(
            f"{name} has {size / 2**20:.0f} MiB, above the limit of {MAX_FILE_BYTES // 2**20} MiB; shrink it."
        )
    try:
        with warnings.catch_warnings():
            # Pillow's own size warning would come before the check below, which is stricter and names the file.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _too_large(name, _size(image.size))
                image.load()
                return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise _too_large(name, "far larger") from error
    except QrloraError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        detail = "it is not one of " + ", ".join(FORMATS) if isinstance(error, Image.UnidentifiedImageError) else detail
        raise QrloraError(f"{name} is no readable picture ({detail}); replace or remove it.") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey to white when it converts; scale instead."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64) / 257.0
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8), mode=None)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


def _too_large(name: str, size: str) -> QrloraError:
    return QrloraError(f"{name} is {size}, above the limit of {MAX_PIXELS // 2**20} million pixels; scale it down.")
