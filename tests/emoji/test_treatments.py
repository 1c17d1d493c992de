"""The procedural styles: sound pictures, all different, and exact where that can be said."""

from itertools import combinations

import numpy as np
import pytest

from tools.emoji.treatments import (
    HELD_OUT_TREATMENTS,
    SKY,
    TRAIN_TREATMENTS,
    TREATMENTS,
    Picture,
    dilate,
    figure,
)
from tools.starter.captions import caption


def drawing(size: int = 64) -> Picture:
    """A red disc with a white hole and a blue bar, on white."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    picture = np.full((size, size, 3), 255, dtype=np.uint8)
    picture[x * x + y * y < 0.16] = (220, 40, 30)
    picture[x * x + y * y < 0.02] = 255
    picture[(abs(y) < 0.06) & (abs(x) > 0.2) & (abs(x) < 0.35)] = (30, 60, 200)
    return picture


def distance(one: Picture, other: Picture) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@pytest.mark.parametrize("name", TREATMENTS)
@pytest.mark.parametrize("size", [64, 128])
def test_is_a_picture_of_the_same_shape_and_leaves_its_input_alone(name: str, size: int) -> None:
    picture = drawing(size)
    before = picture.copy()
    treated = TREATMENTS[name].apply(picture)
    assert treated.dtype == np.uint8
    assert treated.shape == picture.shape
    assert np.array_equal(picture, before)
    assert np.array_equal(treated, TREATMENTS[name].apply(picture)), "not deterministic"
    assert not np.array_equal(treated, picture)
    assert treated.std() > 8, "the content is gone"


def test_all_look_different() -> None:
    picture = drawing()
    treated = {name: one.apply(picture) for name, one in TREATMENTS.items()}
    for one, other in combinations(treated, 2):
        assert distance(treated[one], treated[other]) > 5, (one, other)


def test_registry_splits_and_words() -> None:
    assert len(TRAIN_TREATMENTS) == 8
    assert len(HELD_OUT_TREATMENTS) == 4
    assert set(TRAIN_TREATMENTS).isdisjoint(HELD_OUT_TREATMENTS)
    words = [one.words for one in TREATMENTS.values()]
    assert len(set(words)) == len(words)
    assert caption("red apple", "noto", TREATMENTS["line-drawing"].words) == (
        "a red apple emoji in noto style as a line drawing"
    )
    assert caption("red apple", "noto", None) == "a red apple emoji in noto style"


def test_figure_keeps_holes_and_drops_the_ground() -> None:
    inside = figure(drawing())
    assert inside[32, 32], "a white hole inside the figure belongs to it"
    assert not inside[0, 0]
    assert not inside[63, 63]


def test_dilate_grows_by_the_radius() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[4, 4] = True
    grown = dilate(mask, 2)
    assert grown[4, 2]
    assert grown[4, 6]
    assert grown[2, 4]
    assert not grown[4, 1]
    assert not grown[2, 2]


def test_inverting_twice_gives_the_picture_back() -> None:
    invert = TREATMENTS["inverted"].apply
    assert np.array_equal(invert(invert(drawing())), drawing())


def test_blue_background_changes_the_ground_only() -> None:
    treated = TREATMENTS["blue-background"].apply(drawing())
    assert tuple(treated[0, 0]) == SKY
    assert tuple(treated[32, 32]) == (255, 255, 255)
    assert tuple(treated[20, 32]) == (220, 40, 30)


def test_white_paper_stays_white_in_line_drawing_and_halftone() -> None:
    white = np.full((64, 64, 3), 255, dtype=np.uint8)
    assert (TREATMENTS["line-drawing"].apply(white) == 255).all()
    assert (TREATMENTS["halftone"].apply(white) == 255).all()
    assert (TREATMENTS["halftone"].apply(white * 0) < 64).all()


def test_pixelated_is_flat_in_every_block() -> None:
    blocks = TREATMENTS["pixelated"].apply(drawing()).reshape(16, 4, 16, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
