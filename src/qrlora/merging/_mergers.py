"""Adapters joined with one factor for every column of each, and the penalty on columns that two of them use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from qrlora.formats import Adapter, LowRank
from qrlora.merging._checks import basis_difference
from qrlora.merging._frames import BASIS_TOLERANCE

Overlap = Literal["product", "cosine"]


@dataclass(frozen=True)
class Joined:
    """Adapters of equal layers with one B a layer: `sum_i w_i dW_i diag(m_i) = B A(m)`.

    Columns are those of dW as a matrix: input features, of a convolution flattened inputs, one a channel and place in
    the kernel.

    Attributes:
        B: by layer, as in the files: the stored basis where one on the output side is shared, else all side by side.
        rows: by layer, each adapter's `w_i A_i`, flattened to `[r_i, n]`.
        shared: whether there is one basis.
        inputs: by layer, the shape of A without its first dimension.
    """

    B: Mapping[str, Tensor]
    rows: Mapping[str, tuple[Tensor, ...]]
    shared: bool
    inputs: Mapping[str, tuple[int, ...]]

    @property
    def widths(self) -> list[int]:
        """Columns by layer."""
        return [each[0].shape[1] for each in self.rows.values()]

    @property
    def rank(self) -> int:
        """The largest of the result."""
        return max(B.shape[1] for B in self.B.values())

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Joined":
        """The rows there; B is left where it is."""
        rows = {name: tuple(each.to(device, dtype) for each in parts) for name, parts in self.rows.items()}
        return Joined(self.B, rows, self.shared, self.inputs)

    def merged(self, mergers: Sequence[Tensor]) -> list[Tensor]:
        """`A(m)` of each layer, `[r, n]`, differentiable.

        Args:
            mergers: `[adapters, n]` a layer, or `[adapters, 1]` where all columns have one factor.
        """
        found: list[Tensor] = []
        for parts, own in zip(self.rows.values(), mergers, strict=True):
            scaled = [part * factor for part, factor in zip(parts, own, strict=True)]
            found.append(torch.stack(scaled).sum(dim=0) if self.shared else torch.cat(scaled))
        return found

    def alone(self, index: int) -> list[Tensor]:
        """`A` of each layer with which one adapter acts alone."""
        count = len(next(iter(self.rows.values())))
        one = torch.eye(count)[index][:, None]
        return self.merged([one.to(parts[0]) for parts in self.rows.values()])

    def layers(self, rows: Sequence[Tensor]) -> dict[str, LowRank]:
        """The pairs of B and these A, in fp32 on the CPU."""
        return {
            name: LowRank(self.B[name], each.detach().cpu().float().reshape(-1, *self.inputs[name]).contiguous())
            for name, each in zip(self.rows, rows, strict=True)
        }


def joined(adapters: Sequence[Adapter], weights: Sequence[float]) -> Joined:
    """Weighted adapters side by side, in float64, or on their common basis."""
    header = adapters[0].header
    shared = basis_difference(adapters, BASIS_TOLERANCE) is None and header is not None and header.side == "output"
    B: dict[str, Tensor] = {}
    rows: dict[str, tuple[Tensor, ...]] = {}
    for name, pair in adapters[0].layers.items():
        pairs = [adapter.layers[name] for adapter in adapters]
        B[name] = pair.B if shared else torch.cat([each.B for each in pairs], dim=1)
        rows[name] = tuple(weight * each.A.flatten(1).double() for each, weight in zip(pairs, weights, strict=True))
    return Joined(B, rows, shared, {name: tuple(pair.A.shape[1:]) for name, pair in adapters[0].shapes.items()})


def overlap(mergers: Tensor, widths: Sequence[int], kind: Overlap) -> Tensor:
    """How far adapters use the same columns: the mean over layers, summed over pairs of adapters.

    Args:
        mergers: `[adapters, columns of all layers]`.
        widths: columns by layer.
        kind: of a layer, "product" `mean_j |m_1j m_2j|`, or "cosine" `|cos(m_1, m_2)|` (arXiv 2412.05148).
    """
    sizes = torch.tensor(list(widths), device=mergers.device)
    layer = torch.repeat_interleave(torch.arange(len(sizes), device=mergers.device), sizes)

    def by_layer(values: Tensor) -> Tensor:
        return values.new_zeros(len(sizes)).index_add(0, layer, values)

    total = mergers.new_zeros(())
    for one, other in combinations(mergers.unbind(), 2):
        if kind == "product":
            total = total + (by_layer((one * other).abs()) / sizes).mean()
        else:
            norms = (by_layer(one.square()) * by_layer(other.square())).sqrt()
            tiny = torch.finfo(norms.dtype).tiny
            total = total + (by_layer(one * other).abs() / norms.clamp(min=tiny)).mean()
    return total
