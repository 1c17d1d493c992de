"""How time and memory grow: with rank, tokens, layers, adapters and picture size."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.performance import _layers as layers
from benchmarks.performance import _steps as models
from benchmarks.performance._flux import RANK, flux_inputs, flux_model
from benchmarks.performance._measure import MIB, interleaved, kept_for_backward
from benchmarks.performance._row import Found, Row
from qrlora.adapter import set_adapters

LAYER_WAYS = (layers.FROZEN, layers.OURS, layers.PEFT, layers.SCRIPT, layers.PUBLISHED)
MODEL_WAYS = (models.FROZEN, models.OURS, models.PEFT, models.SCRIPT)
LAYER, STEP = "one layer, forward + backward", "a training step"
RATIO, KEPT = "time over frozen", "MiB kept for backward"

Points = list[dict[str, Any]]


def _found(points: Points, axis: str, of: str) -> Found:
    """Ours at both ends, and one peer's."""
    first, last = points[0], points[-1]

    def told(way: str) -> str:
        return f"{first[RATIO][way]:.2f} to {last[RATIO][way]:.2f}"

    peer = layers.PEFT
    return Found(
        f"{told(layers.OURS)} of frozen, {first[KEPT][layers.OURS]:.1f} to {last[KEPT][layers.OURS]:.1f} MiB kept",
        f"{peer} {told(peer)}, {first[KEPT][peer]:.1f} to {last[KEPT][peer]:.1f} MiB",
        details={"axis": axis, "of": of, "points": points},
    )


def _layer_point(at: float, setting: layers.Setting, repeats: int) -> dict[str, Any]:
    times = layers.compare(setting, LAYER_WAYS, repeats)
    x, _ = setting.tensors()
    kept: dict[str, float] = {}
    for name in LAYER_WAYS:
        one = layers.way(name, setting)
        kept[name] = round(kept_for_backward(one.model, partial(one.forward, x)) / MIB, 3)
    return {"at": at, RATIO: times.ratios(layers.FROZEN), "seconds": times.medians(), KEPT: kept}


def by_rank(quick: bool) -> Found:
    """One layer, 3072 x 3072 in bf16, 1024 tokens."""
    ranks = (2, 4) if quick else (4, 8, 16, 32, 64, 128, 256)
    n, tokens, repeats = (64, 32, 2) if quick else (3072, 1024, 11)
    return _found([_layer_point(r, layers.Setting((n, n), tokens, r), repeats) for r in ranks], "rank", LAYER)


def by_tokens(quick: bool) -> Found:
    """The same at rank 64."""
    counts = (16, 32) if quick else (256, 512, 1024, 2048, 4096)
    n, rank, repeats = (64, 4, 2) if quick else (3072, RANK, 11)
    return _found([_layer_point(t, layers.Setting((n, n), t, rank), repeats) for t in counts], "tokens", LAYER)


def _model_point(at: float, shape: tuple[int, int, int], picture: int, rank: int, repeats: int) -> dict[str, Any]:
    base = flux_model(*shape, torch.bfloat16)
    ways = models.steps(base, flux_inputs(base, picture, 1), rank, MODEL_WAYS)
    times = interleaved(models.calls(ways), repeats)
    kept = {name: round(one.kept() / MIB, 3) for name, one in ways.items()}
    return {"at": at, RATIO: times.ratios(models.FROZEN), "seconds": times.medians(), KEPT: kept}


def by_layers(quick: bool) -> Found:
    """Training steps of a FLUX of width 512 in bf16, 256 pixels, with more and more blocks."""
    depths = (1, 2) if quick else (1, 2, 4, 8)
    width, picture, rank, repeats = (64, 32, 4, 2) if quick else (512, 256, RANK, 9)
    points = []
    for doubles in depths:
        shape = (width, doubles, 2 * doubles)
        adapted = len(models.target_layers(flux_model(*shape, torch.bfloat16, torch.device("meta")), "auto"))
        points.append(_model_point(adapted, shape, picture, rank, repeats))
    return _found(points, "adapted layers", STEP)


def by_picture(quick: bool) -> Found:
    """Training steps of a FLUX of width 1024 in bf16, 2 double and 4 single blocks, one picture a step."""
    sides = (32, 64) if quick else (128, 256, 512, 768)
    shape, rank, repeats = ((64, 1, 1), 4, 2) if quick else ((1024, 2, 4), RANK, 7)
    return _found([_model_point(side, shape, side, rank, repeats) for side in sides], "picture side, pixels", STEP)


def by_adapters(quick: bool) -> Found:
    """One layer, 3072 x 3072 in bf16, 1024 tokens, rank 64: so many adapters of one basis active, all trained."""
    counts = (1, 2) if quick else (1, 2, 4, 8, 16)
    n, tokens, rank, repeats = (64, 32, 4, 2) if quick else (3072, 1024, RANK, 9)
    setting = layers.Setting((n, n), tokens, rank)
    x, gradient = setting.tensors()
    frozen = layers.way(layers.FROZEN, setting)
    points: Points = []
    for count in counts:
        names = [f"adapter_{i}" for i in range(count)]
        ours, theirs = (layers.OneLayer(setting.shape, setting.dtype, setting.device) for _ in range(2))
        trained = layers.add_ours(ours, names, rank=rank, target_modules=["layer"])
        set_adapters(ours, dict.fromkeys(names, 1 / count))
        others = [p for name in names for p in layers.add_peft(theirs, rank, ["layer"], name=name)]
        theirs.set_adapters(names, [1 / count] * count)
        ways = {
            layers.FROZEN: frozen,
            layers.OURS: layers.Way(ours, trained, autocast=True, own=True),
            layers.PEFT: layers.Way(theirs, others),
        }
        calls: dict[str, Callable[[], object]] = {name: partial(one.step, x, gradient) for name, one in ways.items()}
        times = interleaved(calls, repeats)
        kept = {
            name: round(kept_for_backward(one.model, partial(one.forward, x)) / MIB, 3) for name, one in ways.items()
        }
        points.append({"at": count, RATIO: times.ratios(layers.FROZEN), "seconds": times.medians(), KEPT: kept})
    return _found(points, "active adapters of one basis", LAYER)


ROWS = [
    Row("by-rank", "growth with rank, 4 to 256 (layer)", "frozen layer", "", by_rank),
    Row("by-tokens", "growth with tokens, 256 to 4096 (layer)", "frozen layer", "", by_tokens),
    Row("by-layers", "growth with adapted layers (training step)", "frozen model", "", by_layers),
    Row("by-adapters", "growth with active adapters, 1 to 16 (layer)", "frozen layer", "", by_adapters),
    Row("by-picture", "growth with picture size, 128 to 768 pixels (training step)", "frozen model", "", by_picture),
]
