"""Folders of pictures: captions, masks, order."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.data import load_examples
from qrlora.errors import QrloraError


def _save(path: Path, colour: tuple[int, ...] = (255, 0, 0), size: tuple[int, int] = (40, 40)) -> Path:
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path)
    return path


def test_one_picture(tmp_path: Path) -> None:
    (example,) = load_examples(_save(tmp_path / "a.png", (255, 0, 51)), "a cat", 32)
    assert example.caption == "a cat"
    assert example.pixels.shape == (3, 32, 32)
    assert example.pixels.dtype == torch.float32
    torch.testing.assert_close(example.pixels[:, 5, 5], torch.tensor([1.0, -1.0, 51 / 127.5 - 1]))
    assert example.mask is None


def test_captions_text_file_then_metadata_then_prompt(tmp_path: Path) -> None:
    for name in ("c.png", "a.jpg", "b.webp"):
        _save(tmp_path / name)
    (tmp_path / "a.txt").write_text("from the\n text file\n", encoding="utf-8")
    lines = [{"file_name": "a.jpg", "text": "unused"}, {"file_name": "b.webp", "text": "from metadata"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a picture")
    (tmp_path / "sub").mkdir()
    found = [(Path(example.name).name, example.caption) for example in load_examples(tmp_path, "from the prompt", 32)]
    assert found == [("a.jpg", "from the text file"), ("b.webp", "from metadata"), ("c.png", "from the prompt")]


def test_a_picture_without_caption_is_named(tmp_path: Path) -> None:
    _save(tmp_path / "a.png")
    with pytest.raises(QrloraError, match=r"a\.png has no caption; give instance_prompt, a file a\.txt"):
        load_examples(tmp_path, None, 32)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1 is not JSON"),
        ('{"file_name": "a.png"}', r"line 1 must be"),
        ("[]", r"line 1 must be"),
        ('{"file_name": "x.png", "text": "t"}', r"line 1 names x\.png"),
        ('{"file_name": "../a.png", "text": "t"}', r"line 1 names \.\./a\.png"),
        ('{"file_name": "a.png", "text": "t"}\n{"file_name": "a.png", "text": "u"}', r"line 2: a second caption"),
    ],
)
def test_broken_metadata_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    _save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(QrloraError, match=message):
        load_examples(tmp_path, "a cat", 32)


def test_empty_caption_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match="holds no picture"):
        load_examples(tmp_path, "a cat", 32)
    _save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(QrloraError, match=r"a\.txt is empty"):
        load_examples(tmp_path, "a cat", 32)


def test_a_mask_file_wins_over_alpha_and_is_no_picture(tmp_path: Path) -> None:
    _save(tmp_path / "a.png", (255, 0, 0, 128))
    mask = np.zeros((40, 40), np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    (example,) = load_examples(tmp_path, "a cat", 32)
    assert example.mask is not None
    assert example.mask.shape == (1, 32, 32)
    assert example.mask[0, :, :12].min() == 1
    assert example.mask[0, :, 20:].max() == 0


def test_alpha_is_the_mask(tmp_path: Path) -> None:
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[8:24, 8:24] = (0, 0, 255, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    (example,) = load_examples(tmp_path / "a.png", "a cat", 32)
    assert example.mask is not None
    torch.testing.assert_close(example.mask[0], torch.from_numpy(rgba[..., 3].astype(np.float32) / 255))
    assert example.pixels[:, 0, 0].tolist() == [1, 1, 1]


def test_an_all_white_mask_is_none(tmp_path: Path) -> None:
    _save(tmp_path / "a.png")
    Image.new("L", (40, 40), 255).save(tmp_path / "a.mask.png")
    assert load_examples(tmp_path, "a cat", 32)[0].mask is None


def test_bad_masks(tmp_path: Path) -> None:
    _save(tmp_path / "a.png")
    Image.new("L", (40, 39), 255).save(tmp_path / "a.mask.png")
    with pytest.raises(QrloraError, match=r"a\.mask\.png is 40 x 39 pixels, but its picture is 40 x 40"):
        load_examples(tmp_path, "a cat", 32)
    Image.new("L", (40, 40), 0).save(tmp_path / "a.mask.png")
    with pytest.raises(QrloraError, match=r"a\.mask\.png: the mask has nothing white"):
        load_examples(tmp_path, "a cat", 32)


def test_the_metadata_of_a_single_picture(tmp_path: Path) -> None:
    picture = _save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "from metadata"}')
    assert load_examples(picture, "a cat", 32)[0].caption == "from metadata"


@pytest.mark.parametrize("name", ["a.mask.jpg", "a.MASK.png", "a.mask.PNG"])
def test_a_mask_that_would_go_unused_is_named(tmp_path: Path, name: str) -> None:
    picture, other = _save(tmp_path / "a.png"), _save(tmp_path / "b.png")
    _save(tmp_path / "x.png").rename(tmp_path / name)
    for path in (tmp_path, picture):
        with pytest.raises(QrloraError, match="is named like a mask"):
            load_examples(path, "a cat", 32)
    assert len(load_examples(other, "a cat", 32)) == 1
