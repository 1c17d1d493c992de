"""Forward and backward of one adapted layer over the same layer frozen."""

import torch

from benchmarks.performance._layers import (
    ALL,
    FROZEN,
    OURS,
    PEFT,
    PEFT_HALF,
    PRODUCTS,
    PUBLISHED,
    SCRIPT,
    Setting,
    compare,
    deviation,
)
from benchmarks.performance._measure import CPU
from benchmarks.performance._row import Found, Goal, Row, spread

TARGET = 1.05


def _settings(quick: bool, device: torch.device) -> list[Setting]:
    if quick:
        return [Setting((48, 64), 32, 4, device=device)]
    return [Setting((n, n), tokens, 64, device=device) for n in (1536, 3072) for tokens in (1024, 4096)]


def measure(quick: bool, device: torch.device = CPU) -> Found:
    """Worst of the four settings against the target."""
    rows, goals = [], []
    for setting in _settings(quick, device):
        repeats = 3 if quick else 25 if setting.tokens <= 1024 else 15
        times = compare(setting, ALL, repeats)
        ratios = times.ratios(FROZEN)
        where = f"n={setting.shape[1]}, T={setting.tokens}"
        rows.append(
            {
                "out": setting.shape[0],
                "in": setting.shape[1],
                "tokens": setting.tokens,
                "rank": setting.rank,
                "dtype": str(setting.dtype).removeprefix("torch."),
                "ratios": ratios,
                "seconds": times.medians(),
                "operations": round(setting.operations(), 4),
                "deviation": deviation(setting),
            }
        )
        goals.append(Goal(where, ratios[OURS], TARGET))

    def told(way: str) -> str:
        return spread([row["ratios"][way] for row in rows])

    peers = ", ".join(f"{way} {told(way)}" for way in (PEFT, PEFT_HALF, SCRIPT, PUBLISHED))
    allowed = {row["in"]: row["operations"] for row in rows}
    operations = ", ".join(f"{value:.3f} at n={n}" for n, value in allowed.items())
    limit = (
        f"the adapter's own multiplications at the frozen layer's rate make it 1 + r (2 out + 3 in) / (2 out in) = "
        f"{operations} (r={rows[0]['rank']}); the seven bare matrix products, without autograd, take {told(PRODUCTS)}, "
        "since narrow ones are bound by bytes: seven more passes over T x n"
    )
    return Found(told(OURS), peers, tuple(goals), limit, {"settings": rows})


ROWS = [
    Row(
        "layer",
        "forward + backward of an adapted layer (bf16, r=64, T=1024 and 4096, n=1536 and 3072)",
        "the same layer frozen",
        "at most 1.05",
        measure,
    ),
    Row(
        "layer-gpu",
        "the same on a GPU",
        "the same layer frozen",
        "at most 1.05",
        lambda quick: measure(quick, torch.device("cuda")),
        "cuda",
    ),
]
