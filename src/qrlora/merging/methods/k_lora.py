"""K-LoRA: one of two adapters in each layer at each moment, content before style (arXiv 2502.18461)."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank
from qrlora.merging._checks import basis_difference, check_compatible
from qrlora.merging._frames import BASIS_TOLERANCE
from qrlora.merging._registry import register_run_time

Scale = Literal["s", "s*"]
Score = Literal["update", "coefficients"]
OUTLIER = 3.0
"""Layers whose ratio is this many times the mean are left out of gamma."""
_CHUNK = 2**22  # entries of dW at a time


@dataclass(frozen=True)
class KLora:
    """The rule: content where `f(p) < C / (gamma S)`, else style.

    Attributes:
        thresholds: `C / (gamma S)` of each layer that both adapters have; infinite where the style has nothing.
        scale: "s": `f(p) = alpha p + beta`; "s*": `f(p) = (alpha p + 0.85 alpha) mod alpha`.
        alpha, beta: of f.
    """

    thresholds: Mapping[str, float]
    scale: Scale = "s*"
    alpha: float = 1.5
    beta: float = 0.5

    def factor(self, progress: float) -> float:
        """f(p), what the style's score is multiplied by when `progress` (0 to 1) of the noise is gone."""
        if self.scale == "s":
            return self.alpha * progress + self.beta
        return (self.alpha * progress + 0.85 * self.alpha) % self.alpha

    def acting(self, layer: str, progress: float) -> Collection[int]:
        """0 for the content, 1 for the style; both of a layer that they do not have in common."""
        if layer not in self.thresholds:
            return (0, 1)
        return (0,) if self.factor(progress) < self.thresholds[layer] else (1,)


@register_run_time(
    "k-lora",
    "k-lora chooses one adapter for each layer and step while it draws, which no file can hold; draw with it: qrlora "
    "generate --adapter CONTENT --adapter STYLE --method k-lora, or qrlora blend --method k-lora.",
)
def k_lora(
    adapters: Sequence[Adapter],
    *,
    scale: Scale = "s*",
    alpha: float = 1.5,
    beta: float = 0.5,
    score: Score = "update",
) -> KLora:
    """Compare a content and a style layer by layer, once; what acts when then costs nothing.

    `C` and `S` are the sums of a layer's K largest magnitudes in the content's and the style's dW, K being the product
    of their ranks; `gamma` is the mean over layers of `sum |dW_c| / sum |dW_s|`, taken again without the layers where
    that is 3 times the mean or more. So neither adapter's weight changes the choice. The published form compares
    `C / gamma` with `S f(p)` at every call, p counting calls; here p is how much of the noise is gone.

    Args:
        adapters: the content and the style.
        scale: which f; see `KLora`. "s*" is advised for FLUX, "s" for texture.
        alpha: of f, above 0.
        beta: of f in "s".
        score: "update": entries of dW, as published; "coefficients": of the trained factors on one stored basis, which
            is cheaper and another choice.

    Raises:
        QrloraError: not two adapters, adapters that are no LoRA or of different base models, coefficients without one
            basis, or an alpha or beta that is no such number.
    """
    if len(adapters) != 2:
        raise QrloraError(f"k-lora chooses between a content and a style, in this order; {len(adapters)} were given.")
    if not (alpha > 0 and math.isfinite(alpha) and math.isfinite(beta)):
        raise QrloraError(f"alpha={alpha} and beta={beta} must be finite numbers, alpha above 0.")
    check_compatible(adapters, equal_layers=False)
    content, style = adapters
    names = [name for name in content.layers if name in style.layers]
    factor = _trained(adapters, names) if score == "coefficients" else None
    tops: dict[str, tuple[float, float]] = {}
    ratios: list[float] = []
    for name in names:
        pairs = content.layers[name], style.layers[name]
        count = pairs[0].rank * pairs[1].rank
        sums = [_sums(pair, factor, count) for pair in pairs]
        tops[name] = sums[0][0], sums[1][0]
        if sums[1][1]:
            ratios.append(sums[0][1] / sums[1][1])
    gamma = _balance(ratios)
    thresholds = {name: _threshold(top, gamma * other, other) for name, (top, other) in tops.items()}
    return KLora(thresholds, scale, alpha, beta)


def _trained(adapters: Sequence[Adapter], names: Sequence[str]) -> Literal["A", "B"]:
    """The trained factor of adapters that share one stored basis."""
    common = [replace(adapter, layers={name: adapter.layers[name] for name in names}) for adapter in adapters]
    difference = basis_difference(common, BASIS_TOLERANCE)
    if difference is not None:
        raise QrloraError(f"k-lora with score=coefficients needs one basis, but {difference}; leave score at update.")
    header = adapters[0].header
    return "A" if header is not None and header.side == "output" else "B"


def _balance(ratios: Sequence[float]) -> float:
    """Their mean, taken again without outliers; 1 where there are none."""
    if not ratios:
        return 1.0
    mean = math.fsum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio < OUTLIER * mean] or [mean]
    return math.fsum(kept) / len(kept)


def _threshold(top: float, scaled: float, other: float) -> float:
    """`top / scaled`; always the content where the style has nothing."""
    if not other:
        return math.inf
    return top / scaled if scaled else 0.0


def _sums(pair: LowRank, factor: Literal["A", "B"] | None, count: int) -> tuple[float, float]:
    """The sum of the `count` largest magnitudes, and of all, of an update's entries or of one factor's."""
    if factor is not None:
        return _largest([(pair.A if factor == "A" else pair.B).flatten(1)], count)
    B, A = pair.B.flatten(1), pair.A.flatten(1)
    rows = max(1, _CHUNK // A.shape[1])
    return _largest((B[start : start + rows] @ A for start in range(0, len(B), rows)), count)


def _largest(parts: Iterable[Tensor], count: int) -> tuple[float, float]:
    top, total = torch.zeros(0), 0.0
    for part in parts:
        sizes = part.flatten().abs()
        total += float(sizes.double().sum())
        if len(top) == count:
            sizes = sizes[sizes > top[-1]]
        together = torch.cat([top, sizes])
        top = together.topk(min(count, len(together))).values
    return float(top.double().sum()), total
