"""What made a picture, kept inside the picture: a JSON text chunk under the key `qrlora` of every PNG."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from qrlora.errors import QrloraError
from qrlora.formats import atomic_write, open_adapter

PNG_KEY = "qrlora"
_MAX_PIXELS = 2**27
_PEFT_CONFIG = "adapter_config.json"


class AdapterUse(BaseModel):
    """One adapter file at one weight.

    Args:
        file: path of the adapter, relative to the folder of the picture where that is possible.
        sha256: of the file's bytes, or of a peft folder; see `file_hash`.
        weight: factor on its update; the picture was made with `W + weight * B A`.
        timesteps: lowest and highest at which it acted, 0 clean and 1000 pure noise; None is all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    sha256: str
    weight: float
    timesteps: tuple[float, float] | None = None


class RunTime(BaseModel):
    """A method by which adapters act together while a picture is drawn, such as k-lora; see `qrlora.merging`.

    Args:
        name: of the method.
        options: those given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, str | int | float | bool] = {}


def _without(fields: dict[str, Any], *blank: str) -> dict[str, Any]:
    """Without those of some fields that are None."""
    return {name: value for name, value in fields.items() if name not in blank or value is not None}


class Provenance(BaseModel):
    """Everything that `qrlora generate --from PICTURE` needs to make the picture again.

    Args:
        prompt, seed: of the one picture.
        model: hub id or absolute folder; None is the embedded base.
        model_hash: of the denoiser's adapted layers, so that another base under the same name is noticed.
        adapters: in the order in which they were attached.
        settings: generation settings by the pipeline's own argument names.
        device, dtype: where it was computed; other ones give the same picture up to rounding only.
        quantization: of the denoiser's weights; left out of the file where there is none.
        method: by which the adapters acted together, in their order; where there is none, left out, and they add up.
        together: pictures in the batch in which `generate --jobs` drew it, rounding otherwise; left out elsewhere.
        versions: of the libraries that draw it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    prompt: str
    seed: int
    model: str | None
    model_hash: str
    adapters: tuple[AdapterUse, ...] = ()
    settings: dict[str, Any]
    device: str
    dtype: str
    quantization: str | None = None
    method: RunTime | None = None
    together: int | None = None
    versions: dict[str, str] = {}

    @model_serializer(mode="wrap")
    def _without_blank(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without(serialize(self), "quantization", "method", "together")


class SheetProvenance(BaseModel):
    """What made a sheet of many pictures; each of `pictures`, relative to the sheet, has a `Provenance` of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    prompt: str
    seed: int
    model: str | None
    model_hash: str
    adapters: tuple[AdapterUse, ...] = ()
    settings: dict[str, Any]
    method: RunTime | None = None
    pictures: tuple[str, ...]

    @model_serializer(mode="wrap")
    def _without_blank(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without(serialize(self), "method")


class SampleProvenance(BaseModel):
    """What made a validation picture of a training: an adapter at `step` that was in memory, and maybe nowhere else.

    Class pictures are of step 0: the base alone made them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    seed: int
    step: int
    model: str
    settings: dict[str, Any]
    timesteps: tuple[float, float] | None = None


Chunk = Provenance | SheetProvenance | SampleProvenance


def file_hash(path: Path) -> str:
    """sha256 of an adapter file; of a peft folder, that of its weights' sha256 and its `adapter_config.json`'s."""
    if path.is_dir():
        path, config = open_adapter(path).tensors_at, path / _PEFT_CONFIG
        if config.is_file():
            return hashlib.sha256((file_hash(path) + file_hash(config)).encode()).hexdigest()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise QrloraError(f"{path}: no such adapter file.") from error


def relative_to_picture(file: Path, picture: Path) -> str:
    """`file` as seen from the picture's folder, with forward slashes; absolute where the two share no root."""
    try:
        return Path(os.path.relpath(file.resolve(), picture.resolve().parent)).as_posix()
    except ValueError:  # another drive on Windows
        return file.resolve().as_posix()


def model_reference(model: str | None) -> str | None:
    """What the user called a model, as it is understood from any working folder: a folder becomes absolute."""
    return str(Path(model).resolve()) if model is not None and Path(model).is_dir() else model


def save_picture(picture: Image.Image, path: Path, chunk: BaseModel) -> Path:
    """Write a PNG atomically, with `chunk` as JSON under the text key `qrlora`."""
    text = PngInfo()
    text.add_text(PNG_KEY, chunk.model_dump_json())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=text, optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())
    return path


def read_provenance(path: Path) -> Provenance:
    """The provenance of one generated picture.

    Raises:
        QrloraError: no picture, no `qrlora` chunk, one of a whole sheet (its single pictures have their own), or one of
            a training's validation.
    """
    chunk = read_chunk(path)
    if isinstance(chunk, SampleProvenance) and chunk.step == 0:
        raise QrloraError(
            f"{path} is a class picture, drawn by the base of a training; qrlora generate --prompt {chunk.prompt!r} "
            f"--seed {chunk.seed} with that training's model repeats it."
        )
    if isinstance(chunk, SampleProvenance):
        raise QrloraError(
            f"{path} is a validation picture of a training at step {chunk.step}, which names no adapter file to repeat "
            "it with; give a checkpoint's adapter to qrlora generate --adapter instead."
        )
    if isinstance(chunk, SheetProvenance):
        raise QrloraError(f"{path} is a sheet of many pictures; repeat one of those in its 'pictures' folder.")
    return chunk


def has_chunk(path: Path) -> bool:
    """Whether a picture says that qrlora made it; a file that is no picture does not."""
    try:
        read_chunk(path)
    except QrloraError:
        return False
    return True


def read_chunk(path: Path) -> Chunk:
    """What a picture of ours says of itself: one picture, a sheet, or a validation picture.

    Raises:
        QrloraError: no picture, or no `qrlora` chunk.
    """
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.width * picture.height > _MAX_PIXELS:
                raise QrloraError(f"{path}: {picture.width} x {picture.height} pixels are too many to read.")
            text = getattr(picture, "text", {}).get(PNG_KEY)
    except FileNotFoundError as error:
        raise QrloraError(f"{path}: no such picture.") from error
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise QrloraError(f"{path}: not a readable picture ({error}).") from error
    if text is None:
        raise QrloraError(
            f"{path}: no '{PNG_KEY}' text chunk, so it was not made by qrlora or was saved again elsewhere."
        )
    try:
        chunk = json.loads(text)
        if isinstance(chunk, dict) and "pictures" in chunk:
            return SheetProvenance.model_validate(chunk)
        if isinstance(chunk, dict) and "step" in chunk:
            return SampleProvenance.model_validate(chunk)
        return Provenance.model_validate(chunk)
    except (json.JSONDecodeError, RecursionError, ValidationError) as error:
        raise QrloraError(f"{path}: its '{PNG_KEY}' text chunk is damaged or of another version.") from error
