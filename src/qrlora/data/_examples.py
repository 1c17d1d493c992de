"""Pictures that are not read yet, and pictures cut to the size that is trained on."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qrlora.data._buckets import nearest_size
from qrlora.data._pictures import Picture, Window, window
from qrlora.errors import QrloraError

_DRAWS = 100


@dataclass(frozen=True)
class Source:
    """A picture that is not read yet: what sentences call it, its caption, how to read it, and what is done to its
    pixels (uint8 `[H, W, 3]`) once it is cut."""

    name: str
    caption: str
    read: Callable[[], Picture]
    look: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Framing:
    """How pictures are cut.

    Attributes:
        sizes: heights and widths in pixels; each picture goes to the one nearest to it by aspect ratio.
        crops: how many crops of each picture are drawn at random; 0 is one, from the centre.
        seed: of those draws.
    """

    sizes: tuple[tuple[int, int], ...]
    crops: int = 0
    seed: int = 0

    @property
    def count(self) -> int:
        """Crops of each picture."""
        return max(1, self.crops)


@dataclass(frozen=True)
class Example:
    """One crop of a training picture.

    Attributes:
        name: the file, or the row of the data set, that it came from.
        pixels: `[3, height, width]`, fp32 in [-1, 1].
        mask: `[1, height, width]`, fp32 in [0, 1], the weight of the loss; None weights everything alike.
        caption: its prompt.
        original_size: height and width in pixels of the upright picture it was cut from.
        crop_top_left: row and column of its corner in that picture, once resampled.
        crop_right: columns to its right there: `crop_top_left` of the mirrored picture has them.
    """

    name: str
    pixels: Tensor
    mask: Tensor | None
    caption: str
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    crop_right: int

    def mirrored(self) -> "Example":
        """The same crop of the picture mirrored left to right."""
        top, left = self.crop_top_left
        return replace(
            self,
            pixels=self.pixels.flip(-1),
            mask=None if self.mask is None else self.mask.flip(-1),
            crop_top_left=(top, self.crop_right),
            crop_right=left,
        )


def frame(sources: Iterable[Source], framing: Framing) -> Iterator[Example]:
    """Read and cut picture after picture, `framing.count` crops of each one after another.

    Random crops are a function of the seed, the picture's place among `sources` and the crop's number, and of its mask:
    a crop that misses the mask is drawn again.

    Raises:
        QrloraError: an unreadable or absurdly large picture, a mask of another size than its picture's or without
            anything white where the picture is cut.
    """
    for number, source in enumerate(sources):
        picture = source.read()
        width, height = picture.rgb.size
        target = nearest_size((height, width), framing.sizes)
        if not framing.crops:
            yield _cut(source, picture, window((width, height), target))
        for crop in range(framing.crops):
            yield _cut(source, picture, _drawn(picture, target, f"{framing.seed}/{number}/{crop}"))


def _drawn(picture: Picture, target: tuple[int, int], seed: str) -> Window:
    """A window at random, drawn again where it misses the picture's mask."""
    draws = random.Random(seed)
    for _ in range(_DRAWS):
        part = window(picture.rgb.size, target, (draws.random(), draws.random()))
        if picture.mask is None or part.cut(picture.mask).getbbox():
            return part
    raise QrloraError(
        f"{picture.mask_name}: {_DRAWS} crops of that picture found nothing white in the mask; make the masked part "
        "larger, or set center_crop: true."
    )


def _cut(source: Source, picture: Picture, part: Window) -> Example:
    width, height = picture.rgb.size
    across, down = part.target[1] / part.width, part.target[0] / part.height
    cut = np.array(part.cut(picture.rgb))
    seen = cut if source.look is None else source.look(cut)
    pixels = torch.from_numpy(seen).permute(2, 0, 1).float() / 127.5 - 1.0
    return Example(
        name=source.name,
        pixels=pixels.contiguous(),
        mask=None if picture.mask is None else _weight(part.cut(picture.mask), picture.mask_name),
        caption=source.caption,
        original_size=(height, width),
        crop_top_left=(round(part.top * down), round(part.left * across)),
        crop_right=round((width - part.left - part.width) * across),
    )


def _weight(mask: Image.Image, name: str) -> Tensor | None:
    weight = torch.from_numpy(np.array(mask)).float()[None] / 255.0
    if not weight.any():
        raise QrloraError(f"{name}: the mask has nothing white within the centred crop, so nothing would be learned.")
    return None if bool((weight == 1.0).all()) else weight
