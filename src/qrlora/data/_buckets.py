"""Aspect-ratio buckets: the few sizes that pictures are cut to."""

import math
import re
from collections.abc import Sequence

from diffusers.training_utils import generate_aspect_ratio_buckets

from qrlora.errors import QrloraError

Size = tuple[int, int]
AUTO = "auto"
_PAIR = re.compile(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*")


def parse_buckets(text: str) -> tuple[Size, ...]:
    """`"1024,1024;768,1360"` to heights and widths, in the order given.

    Raises:
        QrloraError: another spelling, a side of 0, or a size given twice.
    """
    sizes: list[Size] = []
    for part in text.strip().rstrip(";").split(";"):
        pair = _PAIR.fullmatch(part)
        size = (int(pair[1]), int(pair[2])) if pair else (0, 0)
        if not all(size):
            raise QrloraError(
                f'aspect_ratio_buckets: {part.strip()!r} is no "height,width" in pixels; write '
                '"1024,1024;768,1360;1360,768", or "auto".'
            )
        if size in sizes:
            raise QrloraError(f"aspect_ratio_buckets: {size[0]},{size[1]} is given twice; drop one.")
        sizes.append(size)
    return tuple(sizes)


def training_sizes(buckets: str | None, resolution: int, multiple: int) -> tuple[Size, ...]:
    """The heights and widths that are trained on.

    Args:
        buckets: `parse_buckets`' spelling; `"auto"` for sizes with about the area of `resolution` squared and ratios up
            to 2:1; None for the square alone.
        resolution: pixels of a side of the square.
        multiple: what every side must be a multiple of.

    Raises:
        QrloraError: malformed buckets, or a side that is no such multiple.
    """
    if buckets is None:
        return ((resolution, resolution),)
    if buckets.strip() == AUTO:
        return tuple(generate_aspect_ratio_buckets(resolution, multiple))
    sizes = parse_buckets(buckets)
    for height, width in sizes:
        if height % multiple or width % multiple:
            raise QrloraError(
                f"aspect_ratio_buckets: {height},{width} must be multiples of {multiple} for this model; "
                f"{_rounded(height, multiple)},{_rounded(width, multiple)} is."
            )
    return sizes


def nearest_size(size: Size, sizes: Sequence[Size]) -> Size:
    """The one whose aspect ratio is nearest by its logarithm, so that tall and wide count alike; of equals the first.

    Args:
        size: height and width of a picture.
        sizes: heights and widths to choose from.
    """
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda other: abs(math.log(other[0] / other[1]) - ratio))


def _rounded(value: int, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)
