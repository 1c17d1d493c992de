"""What an adapter layout is, and the registry of layouts; one file a layout in `layouts/`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._adapter import Adapter, SaveDtype
from qrlora.formats._later import Later
from qrlora.formats._safetensors import Contents, TensorEntry, read_tensors
from qrlora.formats._tensors_later import tensors_later

WeightSource = Callable[[str], Tensor]
"""The dense base weight `[out, in]` or `[out, in, kh, kw]` of a layer, by its module path in the denoiser."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file whose header was checked; its tensors are loaded only when asked for.

    Attributes:
        source: what messages call it: the file, or the folder it is in where that was given.
        tensors_at: the file with the tensors.
        contents: its header, checked.
        config: of a peft folder, its `adapter_config.json`.
    """

    source: Path
    tensors_at: Path
    contents: Contents
    config: Mapping[str, Any] | None = None

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """What the header says of each tensor, by key."""
        return self.contents.entries

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's texts."""
        return self.contents.metadata

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU, as they are stored."""
        return read_tensors(self.tensors_at, keys)

    def later(self, keys: Iterable[str]) -> dict[str, Later]:
        """These tensors, each read from the file whenever it is asked for."""
        return tensors_later(self.tensors_at, self.contents, keys)


@dataclass(frozen=True)
class ReadOptions:
    """What a file may not say of itself; see `import_adapter`."""

    basis: str | None = None
    base: WeightSource | None = None
    lora_alpha: float | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class WriteOptions:
    """How an adapter is written; see `write_adapter`."""

    save_dtype: SaveDtype = "fp32"
    family: str | None = None


@dataclass(frozen=True)
class Evidence:
    """Why a file is taken for a layout."""

    keys: int
    """How many of its keys are spelled that way; the layout with most reads the file."""
    why: str


class Layout(ABC):
    """One way to name the tensors of an adapter. Stateless."""

    name: ClassVar[str]
    title: ClassVar[str]
    """For people, such as "kohya"."""
    extension: ClassVar[str] = ".safetensors"
    """What names of written files end in; nothing where a folder is written."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """Those of `basis`, `lora_alpha` and `top_k` in `ReadOptions` that mean something to it."""

    @abstractmethod
    def detect(self, file: AdapterFile, options: ReadOptions) -> Evidence | None:
        """Whether the file may be of this layout, by its header alone."""

    def needs(self, file: AdapterFile, options: ReadOptions) -> str | None:
        """What is missing to read it, or why it cannot be read as a LoRA: the rest of a sentence after its name."""
        return None

    @abstractmethod
    def match(self, file: AdapterFile, options: ReadOptions) -> Mapping[str, str]:
        """What each key that is understood belongs to, by the header alone."""

    @abstractmethod
    def build(self, file: AdapterFile, tensors: Mapping[str, Tensor], options: ReadOptions) -> Adapter:
        """The adapter, from the tensors of the matched keys.

        Raises:
            QrloraError: tensors that do not fit together or are not finite, naming the key.
        """

    def build_later(self, file: AdapterFile, tensors: Mapping[str, Later], options: ReadOptions) -> Adapter:
        """The same with layers that are read when they are asked for; all at once in layouts that must see them all."""
        return self.build(file, {key: tensor.get() for key, tensor in tensors.items()}, options)


class WritableLayout(Layout):
    """A layout that can also be written."""

    @abstractmethod
    def write(self, adapter: Adapter, path: str | Path, options: WriteOptions) -> Path:
        """Write the adapter, atomically, exactly as it is (but for `save_dtype`).

        Raises:
            QrloraError: a layer that has no name in this layout, values that are not finite, nothing can be written.
        """


_LAYOUTS: dict[str, Layout] = {}


def register_layout(layout: Layout) -> Layout:
    """Make a layout known to `read_adapter`, `write_adapter` and the command line."""
    _LAYOUTS[layout.name] = layout
    return layout


def layouts() -> tuple[Layout, ...]:
    """All layouts known, by name."""
    return tuple(_LAYOUTS[name] for name in sorted(_LAYOUTS))


def layout_named(name: str) -> Layout:
    """The layout of that name.

    Raises:
        QrloraError: there is none; the sentence lists those there are.
    """
    if name not in _LAYOUTS:
        raise QrloraError(f"layout {name!r} is not known; the known ones are {', '.join(sorted(_LAYOUTS))}.")
    return _LAYOUTS[name]


def format_names() -> tuple[str, ...]:
    """Names of the layouts that can be written, sorted."""
    return tuple(layout.name for layout in layouts() if isinstance(layout, WritableLayout))
