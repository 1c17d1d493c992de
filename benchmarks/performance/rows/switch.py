"""Several adapters at run time: changing their weights, and what they cost beside one."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.performance._flux import RANK, distinct_shapes, flux_inputs, flux_model, layer_shapes
from benchmarks.performance._layers import add_ours, add_peft, shared_copy
from benchmarks.performance._measure import CPU, interleaved
from benchmarks.performance._row import Found, Goal, Row
from qrlora.adapter import base_hash, set_adapters, target_layers

PAIR = ("content", "style")


def _numbers(model: Any) -> dict[str, float]:
    """A sum over every base weight, in float64."""
    return {
        name: float(parameter.double().sum()) for name, parameter in model.named_parameters() if ".lora_" not in name
    }


def changing(quick: bool) -> Found:
    """On a FLUX of full depth (its width does not matter to what is set); the published way on layers of full size, one
    of each shape, times their count."""
    model = flux_model(64, *((1, 1) if quick else (19, 38)), torch.float32)
    add_ours(model, PAIR, rank=4)
    layers = target_layers(model, "auto")
    before, fingerprint = _numbers(model), base_hash(model, layers)
    weights = iter(range(1, 1000))

    def change() -> None:
        value = next(weights)
        set_adapters(model, {"content": 1 / value, "style": value})

    times = interleaved({"qrlora": change}, 3 if quick else 15)
    changed = sum(before[name] != value for name, value in _numbers(model).items())
    changed += base_hash(model, layers) != fingerprint
    shapes, rank = ({(64, 48): 3}, 4) if quick else (distinct_shapes(layer_shapes()), RANK)
    published = sum(count * _rewrite(shape, rank) for shape, count in shapes.items())
    written = sum(count * m * n for (m, n), count in shapes.items())
    seconds = times.median("qrlora")
    return Found(
        f"{1e3 * seconds:.1f} ms for {len(layers)} layers, {changed} base weights touched",
        f"published: {written / 1e9:.1f} G weights rewritten in {published:.1f} s",
        (Goal("base weights touched", changed, 0),),
        "",
        {
            "layers": len(layers),
            "seconds": times.medians(),
            "published_seconds": published,
            "published_weights": written,
        },
    )


def _rewrite(shape: tuple[int, int], rank: int) -> float:
    """Seconds of `W_res + s Q (R + w1 dR1 + w2 dR2)` into one bf16 weight."""
    m, n = shape
    Q, R, first, second = (torch.randn(*size).bfloat16() for size in ((m, rank), (rank, n), (rank, n), (rank, n)))
    weight, residual = torch.empty(m, n, dtype=torch.bfloat16), torch.randn(m, n).bfloat16()

    def write() -> Tensor:
        return torch.addmm(residual, Q, R + 0.9 * first + 0.8 * second, out=weight)

    return interleaved({"write": write}, 3).median("write")


def merged(quick: bool, device: torch.device = CPU) -> Found:
    """Forward passes of a small FLUX (on a GPU of FLUX.1-dev), as an image step is."""
    rank = 4 if quick else RANK
    shape = (64, 1, 1) if quick else (1024, 2, 4) if device.type == "cpu" else (3072, 19, 38)
    base = flux_model(*shape, torch.bfloat16, device)
    inputs = flux_inputs(base, 32 if quick else 512, 1)
    one, two, theirs = shared_copy(base), shared_copy(base), shared_copy(base)
    add_ours(one, PAIR[:1], rank=rank)
    add_ours(two, PAIR, rank=rank)
    set_adapters(two, {"content": 0.9, "style": 0.8})
    for name in PAIR:
        add_peft(theirs, rank, target_layers(base, "auto"), name=name)
    theirs.set_adapters(list(PAIR), [0.9, 0.8])

    def forward(model: Any) -> None:
        with torch.inference_mode():
            model(**inputs, return_dict=False)

    models = {"base": base, "one adapter": one, "two at run time": two, "peft, two LoRAs": theirs}
    calls = {name: partial(forward, model) for name, model in models.items()}
    times = interleaved(calls, 3 if quick else 15, device=device)
    ratios = times.ratios("one adapter")
    tokens = (512 // 16) ** 2 + 32
    return Found(
        f"{ratios['two at run time']:.3f}",
        f"peft, two LoRAs {ratios['peft, two LoRAs']:.3f}; base {ratios['base']:.3f}",
        (Goal("two over one", ratios["two at run time"], 1.05),),
        f"two of one basis add r in numbers to r in numbers a layer, once a step: 1/{tokens} of one adapter's x A^T at "
        f"{tokens} tokens",
        {"model": list(shape), "rank": rank, "ratios": ratios, "seconds": times.medians()},
    )


ROWS = [
    Row(
        "switch",
        "changing both weights of two adapters",
        "published code: rewrites 5.4 G weights",
        "no weight touched",
        changing,
    ),
    Row("two", "two adapters merged at run time, an image step", "one adapter's step", "at most 1.05", merged),
    Row(
        "two-gpu",
        "the same, FLUX.1-dev on a GPU",
        "one adapter's step",
        "at most 1.05",
        lambda quick: merged(quick, torch.device("cuda")),
        "cuda",
    ),
]
