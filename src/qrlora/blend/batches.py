"""A list of pictures, each with a prompt, a seed and adapters of its own, drawn several at a time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor

from qrlora.adapter import AdapterBank
from qrlora.blend.painter import Painter, Picture, UsedAdapter
from qrlora.blend.provenance import file_hash, save_picture
from qrlora.errors import QrloraError


class Wish(BaseModel):
    """One picture of a list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    adapters: dict[str, FiniteFloat] = {}
    """Adapter files with their weights."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100)
    """Of the picture's file, without its suffix; none means its number in the list."""


def read_wishes(path: Path) -> list[Wish]:
    """The pictures of a list: YAML or JSON, or, where the name ends in .jsonl, one JSON object a line.

    Raises:
        QrloraError: the first problem, with the picture that has it; two pictures of one name.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = path.suffix.lower() == ".jsonl"
        values: Any = (
            [json.loads(line) for line in text.splitlines() if line.strip()] if lines else yaml.safe_load(text)
        )
        wishes = TypeAdapter(list[Wish]).validate_python(values)
    except OSError as error:
        raise QrloraError(f"the list {path} cannot be read: {error.strerror or error}.") from error
    except ValidationError as error:
        raise QrloraError(f"{path}: {_sentence(error)}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise QrloraError(f"the list {path} is not what its name says: {' '.join(str(error).split())}.") from error
    if not wishes:
        raise QrloraError(f"{path} lists no pictures.")
    names = [name.lower() for name in picture_names(wishes)]
    for name in names:
        if names.count(name) > 1:
            raise QrloraError(f"{path}: two pictures would be named {name}; give each a name of its own.")
    return wishes


def _sentence(error: ValidationError) -> str:
    problem = error.errors()[0]
    number, *key = problem["loc"] or ("",)
    if not isinstance(number, int):
        return "a list of pictures is wanted, each a mapping with a prompt."
    where = ".".join(str(part) for part in key)
    return f"picture number {number + 1}: {where or 'it'} is not valid: {problem['msg']}."


def picture_names(wishes: Sequence[Wish]) -> list[str]:
    """What the pictures are named, without a suffix."""
    digits = len(str(len(wishes) - 1))
    return [wish.name or f"{number:0{digits}d}" for number, wish in enumerate(wishes)]


def paint_wishes(painter: Painter, wishes: Sequence[Wish], files: Sequence[Path], together: int) -> Iterator[Path]:
    """Draw pictures, `together` at a time, and write each with its provenance as soon as it is there.

    Every adapter is read once and checked before anything is drawn. A picture differs from the one drawn alone by
    rounding, which its provenance says.

    Args:
        painter: without adapters.
        wishes: what to draw.
        files: where, one each.
        together: pictures in a batch.

    Raises:
        QrloraError: an adapter that cannot be used; see `AdapterBank.add`.
    """
    brush = _Brush(painter)
    try:
        for wish in wishes:
            brush.take(wish)
        for start in range(0, len(wishes), together):
            part = wishes[start : start + together]
            for wish, file, image in zip(part, files[start:], brush.draw(part), strict=False):
                used = tuple(brush.used(path, weight) for path, weight in wish.adapters.items() if weight != 0)
                made = painter.provenance(Picture(image, wish.prompt, wish.seed, used), file)
                yield save_picture(image, file, made.model_copy(update={"together": len(part)}))
    finally:
        brush.close()


class _Brush:
    """A painter's model with a bank of adapters."""

    def __init__(self, painter: Painter) -> None:
        self._painter = painter
        self._bank = AdapterBank(painter.loaded.pipeline, device=painter.loaded.device)
        self._files: dict[str, tuple[Path, str]] = {}
        self._encoded: dict[Any, dict[str, Tensor]] = {}

    def take(self, wish: Wish) -> None:
        for path in wish.adapters:
            if path not in self._files:
                file = Path(path)
                self._files[path] = (file, file_hash(file))
                self._bank.add(path, self._painter.read(file))

    def used(self, path: str, weight: float) -> UsedAdapter:
        return UsedAdapter(*self._files[path], weight)

    def draw(self, wishes: Sequence[Wish]) -> list[Image.Image]:
        model, settings = self._painter.loaded, self._painter.settings
        rows = [{path: weight for path, weight in wish.adapters.items() if weight != 0} for wish in wishes]
        texts = [self._read(wish.prompt, row) for wish, row in zip(wishes, rows, strict=True)]
        away = [self._read(None, row) for row in rows] if model.family.uses_negative(settings) else None
        with self._bank.rows(rows):
            return model.family.generate(
                model.pipeline,
                [wish.prompt for wish in wishes],
                seeds=[wish.seed for wish in wishes],
                batch_size=len(wishes),
                conditioning=_rows(texts),
                negative_conditioning=None if away is None else _rows(away),
                **settings.model_dump(),
            )

    def _read(self, prompt: str | None, row: Mapping[str, float]) -> dict[str, Tensor]:
        """A prompt, or what is guided away from, as the row's adapters read it."""
        model, settings = self._painter.loaded, self._painter.settings
        words = {path: weight for path, weight in row.items() if self._bank.adapts_words(path)}
        key = (prompt, *words.items())
        if key not in self._encoded:
            family, pipeline, length = model.family, model.pipeline, settings.max_sequence_length
            with self._bank.rows([words]):
                if prompt is None:
                    self._encoded[key] = family.encode_negative(pipeline, settings.negative_prompt, length)
                else:
                    self._encoded[key] = family.encode_prompts(pipeline, [prompt], length)
        return self._encoded[key]

    def close(self) -> None:
        self._bank.close()


def _rows(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([rows[key] for rows in each]) for key in each[0]}
