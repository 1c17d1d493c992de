"""DO-Merging: directions apart from magnitudes, made orthogonal first (arXiv 2505.15875)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank
from qrlora.merging._checks import basis_difference
from qrlora.merging._frames import BASIS_TOLERANCE, common_frame, finished, merged_coefficients, pair_of
from qrlora.merging._registry import register_merge

Axis = Literal["input", "output"]
Factors = tuple[Tensor, Tensor]
"""`[p, k]` and `[k, q]` of a product, of which the columns are taken apart."""
Part = TypeVar("Part")


@register_merge("do")
def merge_do(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    strength: float = 0.1,
    steps: int = 100,
    learning_rate: float = 0.2,
    axis: Axis = "input",
    renormalise: bool = False,
) -> Adapter:
    """Take each update apart into directions of norm 1 and their magnitudes, and average both by themselves.

    First the factors are moved a little, by gradient descent on `sum_{i != j} ||A_i A_j^T||^2 + g sum_i ||d_i||^2`,
    so that the adapters' rows become orthogonal to each other's, likewise the columns of B. Then, column by column,
    `D_i` is the moved update's column at norm 1, `c_i` the norm that this column of `dW_i` came with, and `dW = mean_i
    D_i * mean_i c_i`. Being means, the result is weaker than a sum. It is exact, with `D_i = B_i A_i diag(1 / |..|)`,
    at the summed rank.

    Where the adapters share a stored basis on the side that `axis` does not divide by ("input" with a basis on the
    output side), only the trained factor is moved, and rank and basis stay. Elsewhere the factors are those of each
    update's balanced SVD.

    The paper's steps are followed as a review tells them; which norm the first sum has, g, steps, rate and axis are not
    known to us. Here norms are Frobenius, each factor has a largest singular value of 1 while it is moved, so that the
    settings mean the same in every layer, and magnitudes are those before the move, which shrinks what adapters share.

    Args:
        adapters: of equal layers.
        weights: one an adapter: the method works on `w_i dW_i`, so a magnitude is multiplied by |w| and a direction
            turned round where w < 0. An adapter at weight 0 is left out.
        strength: g, how much a factor is held where it was; 0 is free to move.
        steps: of the descent; 0 leaves the factors as they are.
        learning_rate: as a share of the largest step that is safe for one factor alone, above 0 and below 2.
        axis: "input" takes the columns of dW apart, "output" its rows. Of a convolution the columns are the flattened
            inputs, one a channel and place in the kernel.
        renormalise: make the mean direction of norm 1 again before it meets the mean magnitude.

    Raises:
        QrloraError: a strength or a number of steps below 0, a learning rate outside (0, 2), or weights of 0 alone.
    """
    if not (strength >= 0 and steps >= 0):
        raise QrloraError(f"strength={strength} and steps={steps} must not be below 0.")
    if not 0 < learning_rate < 2:
        raise QrloraError(f"learning_rate={learning_rate} must lie between 0 and 2.")
    if not any(weights):
        raise QrloraError("method do takes means over the adapters with a weight, and every weight is 0; give one.")
    descent = _Descent(strength, steps, learning_rate)
    header = adapters[0].header
    if basis_difference(adapters, BASIS_TOLERANCE) is None and header is not None and header.side != axis:

        def combine(name: str, trained: list[Tensor]) -> Tensor:
            pair = adapters[0].layers[name]
            basis = pair.B.flatten(1) if axis == "input" else pair.A.flatten(1).T
            own = _of_weight([each if axis == "input" else each.T for each in trained], weights)
            kept, moved = ([(basis.double(), right) for right in rights] for rights in (own, descent.run(own)))
            merged = torch.stack(_averaged(kept, moved, weights, renormalise)).sum(dim=0)
            return merged if axis == "input" else merged.T

        return merged_coefficients(adapters, weights, "do", combine)
    layers: dict[str, LowRank] = {}
    for name, like in adapters[0].layers.items():
        kept = [_balanced(pair, axis) for pair in _of_weight([each.layers[name] for each in adapters], weights)]
        lefts = [left.T for left in descent.run([left.T for left, _ in kept])]
        moved = list(zip(lefts, descent.run([right for _, right in kept]), strict=True))
        left, right = torch.cat(lefts, dim=1), torch.cat(_averaged(kept, moved, weights, renormalise))
        layers[name] = pair_of(left, right, like) if axis == "input" else pair_of(right.T, left.T, like)
    return finished(layers, adapters, weights, "do", 0.0)


def _of_weight(parts: Sequence[Part], weights: Sequence[float]) -> list[Part]:
    return [part for part, weight in zip(parts, weights, strict=True) if weight]


def _balanced(pair: LowRank, axis: Axis) -> Factors:
    """`U S^1/2` and `S^1/2 V^T` of the update, transposed for rows, so that what is taken apart are columns."""
    left, (coordinates,) = common_frame([pair])
    root = coordinates.square().sum(dim=1).pow(0.25)
    right = coordinates / root.clamp(min=torch.finfo(root.dtype).tiny)[:, None]
    return (left * root, right) if axis == "input" else (right.T, (left * root).T)


def _averaged(
    kept: Sequence[Factors], moved: Sequence[Factors], weights: Sequence[float], renormalise: bool
) -> list[Tensor]:
    """The right factors `[k, q]` of each adapter's part of the mean direction times the mean magnitude; the left ones
    are those of `moved`."""
    used = [weight for weight in weights if weight]
    magnitudes = [abs(weight) * _norms(*factors) for weight, factors in zip(used, kept, strict=True)]
    magnitude = torch.stack(magnitudes).mean(dim=0)
    signs = [1.0 if weight > 0 else -1.0 for weight in used]
    parts = [
        (left, sign / len(used) * right * _inverse(_norms(left, right)))
        for sign, (left, right) in zip(signs, moved, strict=True)
    ]
    if renormalise:
        whole = _norms(torch.cat([left for left, _ in parts], dim=1), torch.cat([right for _, right in parts]))
        magnitude = magnitude * _inverse(whole)
    return [right * magnitude for _, right in parts]


def _norms(left: Tensor, right: Tensor) -> Tensor:
    """Of the columns of `left @ right`, which is not formed."""
    return ((left.T @ left @ right) * right).sum(dim=0).clamp(min=0).sqrt()


def _inverse(norms: Tensor) -> Tensor:
    """1 over norms; 0 where a column is nothing, beside the largest."""
    floor = 1e-9 * norms.max()
    return torch.where(norms > floor, 1 / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)


@dataclass(frozen=True)
class _Descent:
    """Gradient descent on `sum_{i != j} ||X_i X_j^T||^2 + strength sum_i ||X_i - start_i||^2`."""

    strength: float
    steps: int
    learning_rate: float

    def run(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """The factors `[r_i, n]`, moved; each is of spectral norm 1 meanwhile."""
        if len(factors) < 2:
            return list(factors)
        sizes = [cast(Tensor, cast(Any, torch.linalg).matrix_norm(factor, 2)) for factor in factors]
        starts = [factor / size if size > 0 else factor for factor, size in zip(factors, sizes, strict=True)]
        # The largest curvature of one factor while the others stay.
        step = self.learning_rate / (4 * (len(factors) - 1) + 2 * self.strength)
        now = starts
        for _ in range(self.steps):
            now = [self._moved(index, now, starts[index], step) for index in range(len(now))]
        return [size * each for size, each in zip(sizes, now, strict=True)]

    def _moved(self, index: int, now: Sequence[Tensor], start: Tensor, step: float) -> Tensor:
        here = now[index]
        slope = 2 * self.strength * (here - start)
        for other, there in enumerate(now):
            if other != index:
                slope = slope + 4 * (here @ there.T) @ there
        return here - step * slope
