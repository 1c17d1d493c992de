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
    lines = found["a thing as a line drawing"].mean(0)
    assert lines[16, 16] == 1
    assert lines[16, 8] < -0.9


def test_an_unknown_look_is_refused() -> None:
    with pytest.raises(QrloraError, match="there is no look 'sephia'; known are line-drawing, sepia"):
        TrainConfig.parse({"instance_data_dir": "a.png", "output_dir": "out", "looks": ["sephia"]})
