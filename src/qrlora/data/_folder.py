"""A picture or a folder of them, with captions and masks."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from qrlora.data._examples import Example, Framing, Source, frame
from qrlora.data._pictures import SUFFIXES, Picture, open_mask, open_picture
from qrlora.errors import QrloraError

MASK_SUFFIX = ".mask.png"
METADATA = "metadata.jsonl"
_MASK_LIKE = re.compile(r".+\.mask\.[^.]+", re.IGNORECASE)
CAPTION_KEYS = ("text", "caption", "prompt")
MAX_CAPTION_BYTES = 1 << 16


def folder_sources(path: str | Path, instance_prompt: str | None) -> list[Source]:
    """One picture, or every picture of a folder (not of its subfolders) in the order of the names, none of them read.

    The caption is the first found of: the same-stem `.txt` file, the picture's line in the folder's `metadata.jsonl`
    (`{"file_name": ..., "text": ...}`), `instance_prompt`. The mask is `NAME.mask.png` beside `NAME.png`, else the
    picture's own alpha channel. Pictures are turned upright (EXIF) and laid on white.

    Args:
        path: a picture file or a folder.
        instance_prompt: the caption of pictures that have none of their own.

    Raises:
        QrloraError: nothing there, no picture, a picture without caption, a broken `metadata.jsonl` (with the line).
    """
    files = picture_files(path)
    listed = _metadata(files[0].parent / METADATA)
    return [
        Source(
            str(file),
            _caption(file, listed.get(file.name), instance_prompt),
            partial(_read, file, "instance_data_dir"),
        )
        for file in files
    ]


def load_examples(path: str | Path, instance_prompt: str | None, resolution: int) -> list[Example]:
    """The pictures of `folder_sources`, read and cut to the centred square of `resolution` pixels a side.

    Raises:
        QrloraError: as `folder_sources`, and an unreadable or absurdly large file (named), a mask of another size or
            without a white pixel.
    """
    return list(frame(folder_sources(path, instance_prompt), Framing(((resolution, resolution),))))


def class_sources(folder: str | Path, class_prompt: str) -> list[Source]:
    """Every picture of a folder in the order of the names, all under one caption, none of them read.

    Raises:
        QrloraError: nothing there, or no picture.
    """
    key = "class_data_dir"
    return [Source(str(file), class_prompt.strip(), partial(_read, file, key)) for file in picture_files(folder, key)]


def picture_files(path: str | Path, key: str = "instance_data_dir") -> list[Path]:
    """The picture itself, or a folder's pictures by name, without masks and hidden files.

    Args:
        path: a picture file or a folder.
        key: the setting that sentences name.

    Raises:
        QrloraError: nothing there, or a folder without pictures.
    """
    path = Path(path)
    if path.is_file():
        _refuse_stray_masks(path.parent, [path], f"{path.stem}.mask.".lower())
        return [path]
    if not path.is_dir():
        raise QrloraError(f"{key}: there is no picture or folder {path}.")
    files = pictures_in(path)
    if not files:
        raise QrloraError(f"{key}: {path} holds no picture ({', '.join(SUFFIXES)}).")
    _refuse_stray_masks(path, files)
    return files


def pictures_in(folder: Path) -> list[Path]:
    """The folder's pictures by name, without masks and hidden files; perhaps none."""
    return sorted(file for file in folder.iterdir() if _is_picture(file))


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


def _read(file: Path, key: str) -> Picture:
    if not file.is_file():
        raise QrloraError(f"{key}: there is no picture {file} any more; put it back, or start again.")
    picture = open_picture(file)
    beside = file.with_name(file.stem + MASK_SUFFIX)
    if beside.is_file():
        return replace(picture, mask=open_mask(beside, picture.rgb.size), mask_name=str(beside))
    return picture


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
