"""Pictures and captions of a data set, through the `datasets` library."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qrlora.data._examples import Source
from qrlora.data._pictures import Picture, decode_picture, open_picture
from qrlora.errors import QrloraError

SPLIT = "train"


def dataset_sources(
    name: str,
    instance_prompt: str | None,
    *,
    config_name: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
) -> list[Source]:
    """The rows of a data set's train split in their order, no picture decoded.

    Args:
        name: a hub id, or a local folder of pictures (with a `metadata.jsonl`), of Parquet files or of whatever else
            the library reads.
        instance_prompt: the caption of rows that have none.
        config_name: which of the data set's configurations.
        image_column: the column of pictures.
        caption_column: the column of captions; None takes `instance_prompt` for all.

    Raises:
        QrloraError: the library is not installed, no such data set, no train split, no such column (with those there
            are), a column without pictures or captions, a row without either.
    """
    table = _load(name, config_name)
    pictures = _picture_column(table, name, image_column)
    captions = _captions(table, name, caption_column, instance_prompt)
    return [
        Source(_row(name, number), caption, partial(_read, pictures, number, image_column, _row(name, number)))
        for number, caption in enumerate(captions)
    ]


def _load(name: str, config_name: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise QrloraError(
            "dataset_name needs the datasets library, which is not installed: pip install datasets. A local "
            "folder of pictures is read without it as instance_data_dir."
        ) from error
    if name.startswith((".", "~", "/")) and not Path(name).is_dir():
        raise QrloraError(f"dataset_name: there is no folder {name}.")
    try:
        with _bars_on_terminals_alone(datasets):
            splits: Any = datasets.load_dataset(name, config_name)
    except Exception as error:  # every reader below raises its own kinds
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise QrloraError(
            f"dataset_name: {name} cannot be loaded ({detail}); check its name, dataset_config_name, the network, and "
            "for a gated data set that you are logged in (hf auth login)."
        ) from error
    if SPLIT not in splits:
        raise QrloraError(f"dataset_name: {name} has no split {SPLIT!r}; it has {', '.join(splits)}.")
    table = splits[SPLIT]
    if not len(table):
        raise QrloraError(f"dataset_name: the split {SPLIT!r} of {name} is empty.")
    return table


@contextmanager
def _bars_on_terminals_alone(datasets: Any) -> Iterator[None]:
    if sys.stderr.isatty() or not datasets.is_progress_bar_enabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _picture_column(table: Any, name: str, column: str) -> Any:
    """The one column, undecoded: the library's own decoding knows no bounds."""
    import datasets

    _check_column(table, name, "image_column", column)
    kind = table.features[column]
    fields = set(kind) if isinstance(kind, dict) else set()
    if not (isinstance(kind, datasets.Image) or getattr(kind, "dtype", "") == "binary" or fields == {"bytes", "path"}):
        having = [key for key, other in table.features.items() if isinstance(other, datasets.Image)]
        raise QrloraError(
            f"image_column: {column} of {name} holds no pictures ({kind}); "
            + (f"{', '.join(having)} does." if having else "nor does any other column.")
        )
    return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _captions(table: Any, name: str, column: str | None, instance_prompt: str | None) -> list[str]:
    otherwise = (instance_prompt or "").strip()
    if column is None:
        if not otherwise:
            raise QrloraError(
                f"the pictures of {name} have no captions; give caption_column (the columns are "
                f"{', '.join(table.column_names)}) or instance_prompt."
            )
        return [otherwise] * len(table)
    _check_column(table, name, "caption_column", column)
    captions: list[str] = []
    for number, value in enumerate(table[column]):
        if value is not None and not isinstance(value, str):
            raise QrloraError(
                f"caption_column: {column} of {name} holds {type(value).__name__}, not text; name a column of text."
            )
        caption = " ".join((value or "").split()) or otherwise
        if not caption:
            raise QrloraError(f"{_row(name, number)} has an empty {column}; give instance_prompt, or fill it.")
        captions.append(caption)
    return captions


def _check_column(table: Any, name: str, key: str, column: str) -> None:
    if column not in table.column_names:
        raise QrloraError(f"{key}: {name} has no column {column!r}; it has {', '.join(table.column_names)}.")


def _row(name: str, number: int) -> str:
    return f"row {number} of {name}"


def _read(pictures: Any, number: int, column: str, row: str) -> Picture:
    stored = pictures[number][column]
    if stored is None:
        raise QrloraError(f"{row} has no picture in {column}; remove the row or fill it.")
    if stored["bytes"] is not None:
        return decode_picture(stored["bytes"], row)
    return open_picture(stored["path"])
