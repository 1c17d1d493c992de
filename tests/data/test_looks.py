"""Looks of a picture: colours and lines change, the caption says how, the shape stays."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qrlora.data import LOOKS, Framing, folder_sources, frame, in_looks
from qrlora.errors import QrloraError
from qrlora.training import TrainConfig


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A red square on white."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[8:24, 8:24] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "square.png")
    return tmp_path / "square.png"


def test_a_picture_comes_once_for_every_two_looks_and_once_in_each(picture: Path) -> None:
    sources = in_looks(folder_sources(picture, "a <c> thing."), ("inverted", "duotone", "sepia"))
    assert [source.caption for source in sources] == [
        "a <c> thing.",
        "a <c> thing.",
        "a <c> thing in inverted colours",
        "a <c> thing in purple and yellow",
        "a <c> thing in sepia tones",
    ]
    assert sources[2].name == f"{picture} (inverted)"
    assert in_looks(sources[:1], ()) == sources[:1]


def test_looks_change_colours_as_they_say(picture: Path) -> None:
    sources = in_looks(folder_sources(picture, "a thing"), tuple(LOOKS))
    found = {e.caption: e.pixels for e in frame(sources, Framing(((32, 32),)))}
    inside = {caption: (pixels[:, 16, 16] * 127.5 + 127.5).round().int().tolist() for caption, pixels in found.items()}
    assert inside["a thing"] == [255, 0, 0]
    assert inside["a thing in inverted colours"] == [0, 255, 255]
    grey = 0.299  # of red
    assert inside["a thing in purple and yellow"] == [
        round(low + grey * (high - low)) for low, high in zip((58, 12, 110), (255, 222, 60), strict=True)
    ]
    assert inside["a thing in sepia tones"] == [112, 66, 34]  # the second of five steps
    assert inside["a thing in shades of grey"] == [76, 76, 76]
    assert inside["a thing in black and white"] == [0, 0, 0]
    assert inside["a thing as an embossed relief"] == [140, 140, 140]  # .55, flat where the colour is
    halftone = found["a thing as a halftone print"].mean(0)
    assert (halftone[:6] == 1).all()  # paper
    assert -1 < halftone[9:23, 9:23].mean() < -0.3  # dots, most of it ink
    lines = found["a thing as a line drawing"].mean(0)
    assert lines[16, 16] == 1
    assert lines[16, 8] < -0.9


def test_an_unknown_look_is_refused() -> None:
    with pytest.raises(QrloraError, match="there is no look 'sephia'; known are line-drawing, sepia"):
        TrainConfig.parse({"instance_data_dir": "a.png", "output_dir": "out", "looks": ["sephia"]})
