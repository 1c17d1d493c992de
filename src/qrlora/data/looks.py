"""A picture in other colours and lines, with the words for it: what stays the same through them is its content.

A content adapter of one picture learns that picture's colours and shading with the thing, and brings them along into
every style. Shown the same picture in several looks, each named in the caption, it can leave the look to the caption.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from qrlora.data._examples import Source
from qrlora.errors import QrloraError

Pixels = np.ndarray
Colour = tuple[int, int, int]

SEPIA: tuple[Colour, ...] = ((46, 26, 14), (112, 66, 34), (178, 122, 70), (222, 184, 128), (250, 236, 208))
PURPLE: Colour = (58, 12, 110)
YELLOW: Colour = (255, 222, 60)
WHITE_FROM = 0.6  # of brightness: a figure's colours become black, its paper and lights stay white
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Look:
    """What is done to a picture, uint8 `[H, W, 3]` to the same, and what is added to its caption."""

    words: str
    apply: Callable[[Pixels], Pixels]


def grey(picture: Pixels) -> np.ndarray:
    """Brightness in 0..1, float32 [H, W]."""
    return picture.astype(np.float32) @ LUMA / 255.0


def to_bytes(values: np.ndarray) -> Pixels:
    """Values in 0..1, [H, W] or [H, W, 3], as a uint8 picture."""
    picture = np.clip(np.rint(values * 255.0), 0, 255).astype(np.uint8)
    return np.repeat(picture[..., None], 3, axis=2) if picture.ndim == 2 else picture


def unit(size: int) -> int:
    """A length of one pixel at 64, in proportion at other sizes."""
    return max(1, round(size / 64))


def blur(values: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of values in 0..1, [H, W]."""
    image = Image.fromarray(np.rint(values * 255.0).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255.0


def edges(picture: Pixels) -> np.ndarray:
    """Largest Sobel gradient over the channels, 0 and up, float32 [H, W]."""
    values = np.pad(picture.astype(np.float32) / 255.0, ((1, 1), (1, 1), (0, 0)), mode="edge")
    down = values[:-2] - values[2:]
    right = values[:, :-2] - values[:, 2:]
    vertical = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    horizontal = right[:-2] + 2 * right[1:-1] + right[2:]
    return np.hypot(vertical, horizontal).max(axis=2)


def ramp(values: np.ndarray, dark: Colour, light: Colour) -> Pixels:
    """Brightness mapped from one colour to another."""
    low, high = np.array(dark, dtype=np.float32), np.array(light, dtype=np.float32)
    return np.rint(low + np.clip(values, 0, 1)[..., None] * (high - low)).astype(np.uint8)


def line_drawing(picture: Pixels) -> Pixels:
    """Dark lines along the edges, on white."""
    strength = np.clip((edges(picture) - 0.35) / 1.2, 0, 1)
    return to_bytes(1.0 - strength)


def sepia(picture: Pixels) -> Pixels:
    """Brightness in five steps of brown."""
    steps = np.minimum((grey(picture) * len(SEPIA)).astype(int), len(SEPIA) - 1)
    return np.array(SEPIA, dtype=np.uint8)[steps]


def inverted(picture: Pixels) -> Pixels:
    """The negative."""
    return 255 - picture


def duotone(picture: Pixels) -> Pixels:
    """Purple shadows and yellow lights."""
    return ramp(grey(picture), PURPLE, YELLOW)


def halftone(picture: Pixels) -> Pixels:
    """Black dots on white, larger where it is darker."""
    size = picture.shape[0]
    cell = 4 * unit(size)
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]].astype(np.float32)
    u, v = (x + y) * np.pi / cell / np.sqrt(2), (x - y) * np.pi / cell / np.sqrt(2)
    screen = 0.5 + 0.25 * (np.cos(2 * u) + np.cos(2 * v))
    dark = 1.0 - blur(grey(picture), 0.6 * unit(size))
    return to_bytes(np.clip(0.5 + (screen + 0.15 - 1.35 * dark) * 4.0, 0, 1))


def embossed(picture: Pixels) -> Pixels:
    """A grey relief lit from the upper left."""
    step = unit(picture.shape[0])
    values = np.pad(grey(picture), step, mode="edge")
    return to_bytes(0.55 + 1.2 * (values[2 * step :, 2 * step :] - values[: -2 * step, : -2 * step]))


def greyscale(picture: Pixels) -> Pixels:
    """Brightness alone."""
    return to_bytes(grey(picture))


def black_and_white(picture: Pixels) -> Pixels:
    """Two colours, without shades."""
    return to_bytes((grey(picture) > WHITE_FROM).astype(np.float32))


LOOKS: Mapping[str, Look] = {
    "line-drawing": Look("as a line drawing", line_drawing),
    "sepia": Look("in sepia tones", sepia),
    "inverted": Look("in inverted colours", inverted),
    "duotone": Look("in purple and yellow", duotone),
    "halftone": Look("as a halftone print", halftone),
    "embossed": Look("as an embossed relief", embossed),
    "greyscale": Look("in shades of grey", greyscale),
    "black-and-white": Look("in black and white", black_and_white),
}
"""By the name that `looks` of a training gives."""


def in_looks(sources: Iterable[Source], names: Sequence[str]) -> list[Source]:
    """Each picture as it is, once for every two looks, and once in each look.

    Args:
        sources: the pictures with their captions.
        names: of `LOOKS`; none gives the sources alone.

    Raises:
        QrloraError: an unknown name.
    """
    for name in names:
        if name not in LOOKS:
            raise QrloraError(f"looks: there is no look {name!r}; known are {', '.join(LOOKS)}.")
    plain = max(1, (len(names) + 1) // 2)
    return [
        each
        for source in sources
        for each in (*[source] * plain, *(_seen(source, name, LOOKS[name]) for name in names))
    ]


def _seen(source: Source, name: str, look: Look) -> Source:
    caption = f"{source.caption.rstrip(' .,;')} {look.words}"
    return replace(source, name=f"{source.name} ({name})", caption=caption, look=look.apply)
