"""`report.json`: what a blend took and what it made."""

import json
from pathlib import Path
from typing import Any

import torch

from qrlora.adapter import trained_size
from qrlora.blend.config import BlendConfig
from qrlora.blend.painter import Painter, library_versions
from qrlora.blend.provenance import file_hash
from qrlora.blend.weights import BlendWeights
from qrlora.formats import Adapter, atomic_write
from qrlora.training import TrainResult

REPORT_VERSION = 1


def adapter_report(
    adapter: Adapter, file: Path, trained: TrainResult | None, source: str, prompt: str | None
) -> dict[str, Any]:
    """One adapter: where it comes from, its size, and how its training went."""
    header = adapter.header
    report: dict[str, Any] = {
        "file": file.name,
        "bytes": file.stat().st_size,
        "sha256": file_hash(file),
        "source": source,
        "prompt": prompt,
        "basis": header.basis if header is not None else None,
        "mask": header.mask if header is not None else None,
        "method": header.method if header is not None else None,
        "rank": max(pair.rank for pair in adapter.layers.values()),
        "layers": len(adapter.layers),
        "parameters": sum(pair.A.numel() + pair.B.numel() for pair in adapter.layers.values()),
        "trainable_parameters": trained_size(adapter),
    }
    if trained is not None:
        report |= {
            "seconds": {**trained.phases, "total": trained.seconds},
            "steps": len(trained.losses),
            "losses": [round(loss, 6) for loss in trained.losses],
            "training": trained.config.model_dump(mode="json"),
        }
    return report


def write_report(
    path: Path,
    *,
    seconds: dict[str, float],
    config: BlendConfig,
    weights: BlendWeights,
    prompt: str,
    painter: Painter,
    parts: dict[str, dict[str, Any]],
) -> Path:
    """Write the report atomically."""
    report = {
        "version": REPORT_VERSION,
        "prompt": prompt,
        "seed": config.seed,
        "model": config.model or "embedded",
        "model_hash": painter.model_hash,
        "device": str(painter.loaded.denoiser.device),
        "dtype": str(painter.loaded.denoiser.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "settings": painter.settings.model_dump(),
        "weights": {"content": weights.contents, "style": weights.styles},
        "timesteps": {"content": config.content_timesteps, "style": config.style_timesteps},
        "seconds": seconds,
        "adapters": parts,
    }
    return atomic_write(path, json.dumps(report, indent=1))
