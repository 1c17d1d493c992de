"""Procedural styles: deterministic changes of a uint8 picture [H, W, 3], each with its words for the caption."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from qrlora.data import LOOKS
from qrlora.data.looks import blur, edges, grey, ramp, to_bytes, unit

Picture = np.ndarray
Colour = tuple[int, int, int]

WHITE_STEP = 24
SKY: Colour = (92, 156, 232)
RED: Colour = (214, 24, 40)
CYAN: Colour = (170, 244, 250)
PAPER: Colour = (236, 222, 192)


@dataclass(frozen=True)
class Treatment:
    """A treatment, what a caption calls it, and whether the base model may see it."""

    name: str
    words: str
    role: Literal["train", "held-out"]
    apply: Callable[[Picture], Picture]


def figure(picture: Picture) -> np.ndarray:
    """Mask of what is drawn: all that the white border does not reach, bool [H, W]."""
    white = np.pad(picture.min(axis=2) >= 255 - WHITE_STEP, 1, constant_values=True)
    reached = np.zeros_like(white)
    reached[0] = reached[-1] = reached[:, 0] = reached[:, -1] = True
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= white
        if np.array_equal(grown, reached):
            return ~reached[1:-1, 1:-1]
        reached = grown


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """A mask grown by a disc."""
    height, width = mask.shape
    padded = np.pad(mask, radius)
    grown = np.zeros_like(mask)
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            if x * x + y * y <= radius * radius + 1:
                grown |= padded[radius + y : radius + y + height, radius + x : radius + x + width]
    return grown


def paper(size: int, strength: float) -> np.ndarray:
    """Fixed grain around 1, float32 [size, size]."""
    noise = np.random.default_rng(7).standard_normal((size, size)).astype(np.float32)
    coarse = blur(np.clip(0.5 + noise / 6, 0, 1), 0.7 * unit(size)) - 0.5
    return 1.0 + strength * coarse / max(float(coarse.std()), 1e-6)


def pixelated(picture: Picture) -> Picture:
    """Square blocks, sixteen on a side."""
    height, width = picture.shape[:2]
    small = Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


def blue_background(picture: Picture) -> Picture:
    """The same drawing on blue paper: the ground around the figure is replaced, its soft rim multiplied."""
    inside = figure(picture)
    near = dilate(~inside, unit(picture.shape[0]))
    tinted = np.rint(picture.astype(np.float32) * np.array(SKY, dtype=np.float32) / 255.0).astype(np.uint8)
    return np.where((near & (picture.min(axis=2) > 128))[..., None], tinted, picture)


def pencil(picture: Picture) -> Picture:
    """Diagonal pencil strokes, crossed where it is darker, with faint outlines."""
    size = picture.shape[0]
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    period = 4 * unit(size)
    dark = 1.0 - blur(grey(picture), 0.5 * unit(size))
    first = ((x + y) % period < period / 2) & (dark > 0.12)
    second = ((x - y) % period < period / 2) & (dark > 0.5)
    strokes = 0.45 * first + 0.35 * second
    outline = 0.8 * np.clip((edges(picture) - 0.4) / 1.2, 0, 1)
    return to_bytes((1.0 - np.clip(np.maximum(strokes, outline), 0, 0.9)) * paper(size, 0.02))


def paper_shadow(picture: Picture) -> Picture:
    """Lying on grained beige paper, with a drop shadow to the lower right."""
    size, shift = picture.shape[0], 4 * unit(picture.shape[0])
    inside = figure(picture)
    solid = blur(inside.astype(np.float32), 0.5 * unit(size)) * inside
    moved = np.zeros_like(solid)
    moved[shift:, shift:] = inside[:-shift, :-shift]
    shade = 1.0 - 0.6 * blur(moved, 1.5 * unit(size))
    ground = np.array(PAPER, dtype=np.float32) / 255.0 * (paper(size, 0.05) * shade)[..., None]
    return to_bytes(ground + solid[..., None] * (picture.astype(np.float32) / 255.0 - ground))


def thick_outline(picture: Picture) -> Picture:
    """A thick black contour around the figure."""
    inside = figure(picture)
    step = unit(picture.shape[0])
    rim = dilate(inside, 3 * step) & dilate(~inside, step)
    return np.where(rim[..., None], np.uint8(0), picture)


def red_cyan(picture: Picture) -> Picture:
    """Red shadows and cyan lights."""
    return ramp(grey(picture), RED, CYAN)


def _look(name: str) -> Treatment:
    """One that the library has too, for content adapters."""
    return Treatment(name, LOOKS[name].words, "train", LOOKS[name].apply)


TREATMENTS: dict[str, Treatment] = {
    treatment.name: treatment
    for treatment in (
        _look("line-drawing"),
        _look("sepia"),
        _look("inverted"),
        _look("halftone"),
        _look("embossed"),
        Treatment("pixelated", "as pixel art", "train", pixelated),
        Treatment("blue-background", "on a blue background", "train", blue_background),
        _look("duotone"),
        Treatment("pencil", "in pencil hatching", "held-out", pencil),
        Treatment("paper-shadow", "on paper with a shadow", "held-out", paper_shadow),
        Treatment("thick-outline", "with a thick outline", "held-out", thick_outline),
        Treatment("red-cyan", "in red and cyan", "held-out", red_cyan),
    )
}
TRAIN_TREATMENTS: tuple[str, ...] = tuple(name for name, one in TREATMENTS.items() if one.role == "train")
HELD_OUT_TREATMENTS: tuple[str, ...] = tuple(name for name, one in TREATMENTS.items() if one.role == "held-out")
