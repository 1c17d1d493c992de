"""Sizes that pictures are cut to, and where they are cut."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qrlora.data import Framing, folder_sources, frame, nearest_size, parse_buckets, training_sizes
from qrlora.data._pictures import window
from qrlora.errors import QrloraError

SIDES = st.integers(1, 300)


def test_diffusers_spelling() -> None:
    assert parse_buckets(" 1024,1024;768, 1360 ;") == ((1024, 1024), (768, 1360))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"'' is no \"height,width\""),
        ("1024", r"'1024' is no"),
        ("64,64;;32,96", r"'' is no"),
        ("64x64", r"'64x64' is no"),
        ("64,0", r"'64,0' is no"),
        ("-64,64", r"'-64,64' is no"),
        ("64,64;32,96;64,64", r"64,64 is given twice"),
    ],
)
def test_malformed_buckets_are_quoted(text: str, message: str) -> None:
    with pytest.raises(QrloraError, match=f"aspect_ratio_buckets: {message}"):
        parse_buckets(text)


def test_sizes_of_a_run() -> None:
    assert training_sizes(None, 512, 16) == ((512, 512),)
    assert training_sizes("64,64;32,96", 512, 16) == ((64, 64), (32, 96))
    with pytest.raises(QrloraError, match=r"60,64 must be multiples of 16 for this model; 64,64 is"):
        training_sizes("60,64", 512, 16)


@pytest.mark.parametrize(("resolution", "multiple"), [(1024, 16), (512, 16), (1024, 8), (64, 16)])
def test_automatic_sizes_have_the_squares_area_and_ratios_up_to_two(resolution: int, multiple: int) -> None:
    sizes = training_sizes("auto", resolution, multiple)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        # each side is rounded by half a multiple at most, so the area by this much
        slack = multiple / 2 * (height + width) + multiple**2 / 4
        assert abs(height * width - resolution**2) <= slack
    assert {(width, height) for height, width in sizes} == set(sizes)
    if resolution >= 512:
        assert 1.9 < max(width / height for height, width in sizes) < 2.1


@settings(max_examples=100, deadline=None)
@given(SIDES, SIDES, st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=6, unique=True))
def test_the_nearest_ratio(height: int, width: int, sizes: list[tuple[int, int]]) -> None:
    """By ratios of ratios, so twice as wide is as far off as twice as tall."""

    def off(size: tuple[int, int]) -> float:
        ratio = (size[0] / size[1]) / (height / width)
        return max(ratio, 1 / ratio)

    best = nearest_size((height, width), sizes)
    assert off(best) <= min(map(off, sizes)) * (1 + 1e-9)
    assert nearest_size((height, width), [(7, 3), (height * 2, width * 2), (height, width)]) == (
        (7, 3) if height * 3 == width * 7 else (height * 2, width * 2)
    )


@settings(max_examples=100, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_window_is_the_largest_of_its_ratio_and_within(
    width: int, height: int, target_height: int, target_width: int, across: float, down: float
) -> None:
    target = (target_height, target_width)
    for part in (window((width, height), target), window((width, height), target, (across, down))):
        assert part.left >= 0
        assert part.top >= 0
        assert part.left + part.width <= width
        assert part.top + part.height <= height
        assert part.width == width or part.height == height
        exact = min(width, height * target_width / target_height), min(height, width * target_height / target_width)
        assert abs(part.width - max(1, exact[0])) <= 0.5
        assert abs(part.height - max(1, exact[1])) <= 0.5
    centre = window((width, height), target)
    assert (centre.left, centre.top) == ((width - centre.width) // 2, (height - centre.height) // 2)


def _ramp(path: Path, width: int, height: int) -> np.ndarray:
    """A picture whose red tells the column and whose green tells the row."""
    values = np.zeros((height, width, 3), np.uint8)
    values[..., 0] = np.arange(width)[None, :]
    values[..., 1] = np.arange(height)[:, None]
    Image.fromarray(values).save(path)
    return values


def test_pictures_go_to_their_buckets_and_masks_follow(tmp_path: Path) -> None:
    values = _ramp(tmp_path / "wide.png", 96, 32)
    mask = np.zeros((32, 96), np.uint8)
    mask[:, 40:60] = 255
    Image.fromarray(mask).save(tmp_path / "wide.mask.png")
    _ramp(tmp_path / "tall.png", 30, 61)
    tall, wide = frame(folder_sources(tmp_path, "a <c>"), Framing(((32, 32), (32, 64), (64, 32))))
    assert tall.pixels.shape == (3, 64, 32)
    assert (tall.original_size, tall.mask) == ((61, 30), None)
    assert wide.pixels.shape == (3, 32, 64)  # 16 columns are cut off on either side, nothing is resampled
    expected = torch.from_numpy(values[:, 16:80].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(wide.pixels, expected)
    assert wide.mask is not None
    assert wide.mask[0, 0].nonzero().flatten().tolist() == list(range(24, 44))
    assert (wide.original_size, wide.crop_top_left, wide.crop_right) == ((32, 96), (0, 16), 16)


def test_where_a_crop_lies_is_told_in_pixels_of_the_resampled_picture(tmp_path: Path) -> None:
    _ramp(tmp_path / "a.png", 200, 80)
    (example,) = frame(folder_sources(tmp_path, "a <c>"), Framing(((40, 40),)))
    assert (example.original_size, example.crop_top_left, example.crop_right) == ((80, 200), (0, 30), 30)


def test_random_crops_are_drawn_by_seed(tmp_path: Path) -> None:
    values = _ramp(tmp_path / "a.png", 96, 32)
    _ramp(tmp_path / "b.png", 96, 32)
    sources = folder_sources(tmp_path, "a <c>")
    sizes = ((32, 32),)
    examples = list(frame(sources, Framing(sizes, 20, seed=1)))
    assert [example.name for example in examples] == [source.name for source in sources for _ in range(20)]
    lefts = [example.crop_top_left[1] for example in examples]
    assert len(set(lefts[:20])) > 10
    assert lefts[:20] != lefts[20:]
    assert min(lefts) < 15
    assert max(lefts) > 49
    for example, left in zip(examples, lefts, strict=True):
        expected = torch.from_numpy(values[:, left : left + 32].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(example.pixels, expected)
        assert left + 32 + example.crop_right == 96
    again = [example.crop_top_left[1] for example in frame(sources, Framing(sizes, 20, seed=1))]
    other = [example.crop_top_left[1] for example in frame(sources, Framing(sizes, 20, seed=2))]
    assert again == lefts
    assert other != lefts
    fewer = [example.crop_top_left[1] for example in frame(sources, Framing(sizes, 5, seed=1))]
    assert fewer == lefts[:5] + lefts[20:25]


def test_random_crops_keep_to_the_mask(tmp_path: Path) -> None:
    _ramp(tmp_path / "a.png", 96, 32)
    mask = np.zeros((32, 96), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    examples = list(frame(folder_sources(tmp_path, "a <c>"), Framing(((32, 32),), 30)))
    assert max(example.crop_top_left[1] for example in examples) < 4
    assert all(example.mask is not None and example.mask.any() for example in examples)
    Image.new("RGB", (20_000, 4)).save(tmp_path / "a.png")
    mask = np.zeros((4, 20_000), np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    with pytest.raises(QrloraError, match=r"a\.mask\.png: 100 crops of that picture found nothing white in the mask"):
        list(frame(folder_sources(tmp_path, "a <c>"), Framing(((32, 32),), 30)))


def test_the_mirrored_crop(tmp_path: Path) -> None:
    _ramp(tmp_path / "a.png", 96, 32)
    (example,) = frame(folder_sources(tmp_path, "a <c>"), Framing(((32, 32),), 1))
    top, left = example.crop_top_left
    mirrored = example.mirrored()
    assert mirrored.crop_top_left == (top, 96 - 32 - left)
    assert torch.equal(mirrored.pixels, example.pixels.flip(-1))
    back = mirrored.mirrored()
    assert torch.equal(back.pixels, example.pixels)
    assert (back.crop_top_left, back.crop_right) == (example.crop_top_left, example.crop_right)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(training_sizes("auto", 512, 16)))
def test_a_picture_of_a_buckets_own_shape_loses_nothing(size: tuple[int, int]) -> None:
    part = window((size[1] * 2, size[0] * 2), size)
    assert (part.left, part.top, part.width, part.height) == (0, 0, size[1] * 2, size[0] * 2)
    assert math.isclose(part.width / part.height, size[1] / size[0])
