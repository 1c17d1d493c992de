"""A picture or a folder of them, with captions and masks, as training examples."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qrlora.data._pictures import SUFFIXES, open_mask, open_picture, square
from qrlora.errors import QrloraError

MASK_SUFFIX = ".mask.png"
METADATA = "metadata.jsonl"
_MASK_LIKE = re.compile(r".+\.mask\.[^.]+", re.IGNORECASE)
CAPTION_KEYS = ("text", "caption", "prompt")
MAX_CAPTION_BYTES = 1 << 16


@dataclass(frozen=True)
class Example:
    """One training picture.

    Attributes:
        path: the file it came from.
        pixels: `[3, resolution, resolution]`, fp32 in [-1, 1].
        mask: `[1, resolution, resolution]`, fp32 in [0, 1], the weight of the loss; None weights everything alike.
        caption: its prompt.
    """

    path: Path
    pixels: Tensor
    mask: Tensor | None
    caption: str


def load_examples(path: str | Path, instance_prompt: str | None, resolution: int) -> list[Example]:
    """Read one picture, or every picture of a folder (not of its subfolders) in the order of the names.

    The caption is the first found of: the same-stem `.txt` file, the picture's line in the folder's `metadata.jsonl`
    (`{"file_name": ..., "text": ...}`), `instance_prompt`. The mask is `NAME.mask.png` beside `NAME.png`, else the
    picture's own alpha channel. Pictures are turned upright (EXIF), laid on white, cropped to the centred square and
    resampled.

    Args:
        path: a picture file or a folder.
        instance_prompt: the caption of pictures that have none of their own.
        resolution: pixels of a side.

    Raises:
        QrloraError: nothing there, no picture, a picture without caption, an unreadable or absurdly large file (named),
            a mask of another size or without a white pixel, a broken `metadata.jsonl` (with the line).
    """
    files = picture_files(path)
    listed = _metadata(files[0].parent / METADATA)
    return [_example(file, listed.get(file.name), instance_prompt, resolution) for file in files]


def picture_files(path: str | Path) -> list[Path]:
    """The picture itself, or a folder's pictures by name, without masks and hidden files.

    Raises:
        QrloraError: nothing there, or a folder without pictures.
    """
    path = Path(path)
    if path.is_file():
        _refuse_stray_masks(path.parent, [path], f"{path.stem}.mask.".lower())
        return [path]
    if not path.is_dir():
        raise QrloraError(f"instance_data_dir: there is no picture or folder {path}.")
    files = sorted(file for file in path.iterdir() if _is_picture(file))
    if not files:
        raise QrloraError(f"instance_data_dir: {path} holds no picture ({', '.join(SUFFIXES)}).")
    _refuse_stray_masks(path, files)
    return files


def _refuse_stray_masks(folder: Path, pictures: list[Path], start: str = "") -> None:
    """A mask that would silently go unused."""
    masks = {picture.stem + MASK_SUFFIX for picture in pictures}
    for file in sorted(folder.iterdir()):
        name = file.name
        looks = _MASK_LIKE.fullmatch(name) and name.lower().startswith(start) and not name.startswith(".")
        if looks and name not in masks and file not in pictures and file.is_file():
            raise QrloraError(
                f"{file} is named like a mask, but is no NAME{MASK_SUFFIX} of a picture there; rename or remove it."
            )


def _is_picture(file: Path) -> bool:
    name = file.name.lower()
    return name.endswith(SUFFIXES) and not _MASK_LIKE.fullmatch(name) and not name.startswith(".") and file.is_file()


def _example(file: Path, listed: str | None, instance_prompt: str | None, resolution: int) -> Example:
    picture = open_picture(file)
    mask, source = picture.mask, file
    beside = file.with_name(file.stem + MASK_SUFFIX)
    if beside.is_file():
        mask, source = open_mask(beside, picture.rgb.size), beside
    pixels = torch.from_numpy(np.array(square(picture.rgb, resolution))).permute(2, 0, 1).float() / 127.5 - 1.0
    weight = None if mask is None else _weight(mask, resolution, source)
    return Example(file, pixels.contiguous(), weight, _caption(file, listed, instance_prompt))


def _weight(mask: Image.Image, resolution: int, source: Path) -> Tensor | None:
    weight = torch.from_numpy(np.array(square(mask, resolution))).float()[None] / 255.0
    if not weight.any():
        raise QrloraError(
            f"{source}: the mask has nothing white within the centred square, so nothing would be learned."
        )
    return None if bool((weight == 1.0).all()) else weight


def _caption(file: Path, listed: str | None, instance_prompt: str | None) -> str:
    text = file.with_suffix(".txt")
    if text.is_file():
        return _read_caption(text)
    caption = listed if listed is not None else instance_prompt
    if caption is None or not caption.strip():
        raise QrloraError(
            f"{file} has no caption; give instance_prompt, a file {text.name} beside it, or a line in {METADATA}."
        )
    return caption.strip()


def _read_caption(file: Path) -> str:
    if file.stat().st_size > MAX_CAPTION_BYTES:
        raise QrloraError(f"{file} is too large for a caption ({file.stat().st_size} bytes).")
    try:
        caption = " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise QrloraError(f"{file} is not UTF-8 text; save the caption as UTF-8.") from error
    if not caption:
        raise QrloraError(f"{file} is empty; write the caption into it or remove it.")
    return caption


def _metadata(file: Path) -> Mapping[str, str]:
    """File name to caption, from one JSON object a line."""
    if not file.is_file():
        return {}
    captions: dict[str, str] = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise QrloraError(f"{file} is not UTF-8 text.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name, caption = _metadata_line(file, number, line)
            if name in captions:
                raise QrloraError(f"{file}, line {number}: a second caption for {name}; keep one.")
            captions[name] = caption
    return captions


def _metadata_line(file: Path, number: int, line: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise QrloraError(f"{file}, line {number} is not JSON ({error}).") from error
    name = entry.get("file_name") if isinstance(entry, dict) else None
    caption = next((entry[key] for key in CAPTION_KEYS if key in entry), None) if isinstance(entry, dict) else None
    if not isinstance(name, str) or not isinstance(caption, str) or not caption.strip():
        raise QrloraError(f'{file}, line {number} must be {{"file_name": "NAME.png", "text": "a caption"}}.')
    if Path(name).name != name or not (file.parent / name).is_file():
        raise QrloraError(f"{file}, line {number} names {name}, which is no file of that folder.")
    return name, caption
