"""What was computed, kept by the hash of all it depends on, and how long the rest will take."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qrlora.formats import Adapter, atomic_write, read_adapter, read_safetensors, write_safetensors

VERSION = 1
"""Raised when the code changes what a key stands for."""


def key_of(parts: Mapping[str, Any]) -> str:
    """A hash of JSON values, whatever the order of their keys."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def digest(pictures: np.ndarray) -> str:
    """A hash of pictures, uint8."""
    return hashlib.sha256(repr(pictures.shape).encode() + np.ascontiguousarray(pictures).tobytes()).hexdigest()[:24]


class NotThereYet(Exception):
    """Something is not in the store, and nothing may be computed now."""


@dataclass(frozen=True)
class Store:
    """Files below a folder, each whole or not there.

    Attributes:
        folder: of one base.
    """

    folder: Path

    def json(self, kind: str, key: str) -> Any | None:
        """What `put_json` kept, or None."""
        path = self.folder / kind / f"{key}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def put_json(self, kind: str, key: str, value: Any) -> None:
        """Keep a JSON value."""
        atomic_write(self.folder / kind / f"{key}.json", json.dumps(value) + "\n")

    def pictures(self, key: str) -> np.ndarray | None:
        """What `put_pictures` kept, uint8 `[N, H, W, 3]`, or None."""
        path = self.folder / "pictures" / f"{key}.safetensors"
        return read_safetensors(path)[0]["pictures"].numpy() if path.exists() else None

    def put_pictures(self, key: str, pictures: np.ndarray) -> None:
        """Keep pictures."""
        tensors = {"pictures": torch.from_numpy(pictures)}
        write_safetensors(self.folder / "pictures" / f"{key}.safetensors", tensors)

    def has_adapter(self, key: str) -> bool:
        """Whether `put_adapter` was called for it."""
        return self._losses(key).exists()

    def adapter(self, key: str) -> Adapter | None:
        """What `put_adapter` kept; None for one that diverged."""
        path = self.folder / "adapters" / f"{key}.safetensors"
        return read_adapter(path) if path.exists() else None

    def put_adapter(self, key: str, adapter: Adapter | None, losses: list[float]) -> None:
        """Keep an adapter and its losses, which come last: where they are, the rest is complete."""
        if adapter is not None:
            adapter.save(self.folder / "adapters" / f"{key}.safetensors")
        atomic_write(self._losses(key), json.dumps([round(loss, 6) for loss in losses]) + "\n")

    def _losses(self, key: str) -> Path:
        return self.folder / "adapters" / f"{key}.json"


@dataclass
class Progress:
    """One line now and then: what is done, and how long the rest takes at the pace of what was computed.

    Work is counted in passes of one picture through the denoiser; a training step counts as three.
    """

    total: float = 0
    done: float = 0
    computed: float = 0
    every: float = 30
    say: Callable[[str], None] = field(default=lambda text: print(text, flush=True))
    _started: float = field(default_factory=time.monotonic)
    _said: float = 0

    def plan(self, work: float) -> None:
        """More to do."""
        self.total += work

    def found(self, work: float) -> None:
        """Work that was in the store."""
        self.done += work

    def step(self, work: float, what: str) -> None:
        """Work that was computed just now."""
        self.done += work
        self.computed += work
        now = time.monotonic()
        if now - self._said >= self.every:
            self._said = now
            self.say(f"{what}: {self.line(now - self._started)}")

    def line(self, elapsed: float) -> str:
        """Share done and minutes left."""
        share = self.done / self.total if self.total else 1.0
        left = max(self.total - self.done, 0.0) * elapsed / self.computed if self.computed else float("nan")
        return f"{share:.0%} done, {elapsed / 60:.1f} min spent, about {left / 60:.0f} min left"
