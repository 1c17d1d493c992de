"""What a metric is, and the metrics by name. A metric is one class in a file of `metrics/`."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from PIL import Image
from torch import Tensor

from qrlora.errors import QrloraError

Aspect = Literal["content", "style", "text"]
BATCH = 16


class Metric(ABC):
    """Features of pictures, whose cosines are the scores.

    A metric has a class attribute `about` (one sentence: what its features are) and `aspects` (what they are good for).

    Attributes:
        model: what it computes with, as the report names it.
        network: the `nn.Module` that computes; None where there is none.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    aspects: ClassVar[tuple[Aspect, ...]]
    lowest: ClassVar[float] = -1.0
    """The smallest cosine its features can have."""
    model: str
    network: Any = None

    @classmethod
    @abstractmethod
    def load(cls, model: str | None) -> Self:
        """Make it ready, on the CPU.

        Args:
            model: a folder or a hub id; the metric's own where None.

        Raises:
            QrloraError: a package or a model that is not there, or that is not of this metric's kind.
        """

    @abstractmethod
    def _pixels(self, picture: Image.Image) -> Tensor:
        """What one RGB picture is given to `_embed` as, all of one shape."""

    @abstractmethod
    def _embed(self, pixels: Tensor) -> Tensor:
        """`[N, ...]` to `[N, d]`."""

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features `[N, d]` of RGB pictures of any sizes, float32 on the CPU."""
        with torch.no_grad():
            parts = [
                self._embed(
                    torch.stack([self._pixels(picture) for picture in pictures[start : start + BATCH]]).to(self.device)
                )
                for start in range(0, len(pictures), BATCH)
            ]
        return torch.cat(parts).float().cpu()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features `[N, d]` of texts, to be compared with those of pictures; for metrics of the aspect `text`."""
        raise NotImplementedError(f"{self.name} does not read texts")

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        tensor = next(self.network.parameters(), None) if self.network is not None else None
        return tensor.device if tensor is not None else torch.device("cpu")

    def to(self, device: str | torch.device) -> None:
        """Compute there from now on."""
        if self.network is not None:
            self.network.to(device)


_METRICS: dict[str, type[Metric]] = {}
DEFAULT_METRICS = ("efficientnet", "look")


def register_metric(name: str) -> Callable[[type[Metric]], type[Metric]]:
    """Register a class as the metric of a name, which the command line and the report call it by."""

    def register(cls: type[Metric]) -> type[Metric]:
        cls.name = name
        _METRICS[name] = cls
        return cls

    return register


def metric_names() -> tuple[str, ...]:
    """The names `load_metrics` takes."""
    return tuple(sorted(_METRICS))


def load_metrics(names: Sequence[str] = DEFAULT_METRICS, models: Mapping[str, str] | None = None) -> list[Metric]:
    """Metrics by name, ready to compute on the CPU.

    Args:
        names: see `metric_names`; none twice.
        models: by name, the folder or hub id to compute with.

    Raises:
        QrloraError: an unknown name, one given twice, a model for a metric that is not asked for, and what
            `Metric.load` says.
    """
    given = dict(models or {})
    for name in (*names, *given):
        if name not in _METRICS:
            close = difflib.get_close_matches(name, _METRICS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(metric_names())}."
            raise QrloraError(f"there is no metric {name!r}; {hint}")
    if len(set(names)) != len(names):
        raise QrloraError(f"metrics {', '.join(names)}: one of them is named twice; drop it.")
    unused = [name for name in given if name not in names]
    if unused:
        raise QrloraError(f"a model is given for {unused[0]}, which is not among the metrics {', '.join(names)}.")
    return [_METRICS[name].load(given.get(name)) for name in names]
