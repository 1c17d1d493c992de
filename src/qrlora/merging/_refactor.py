"""An adapter at another rank."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats import Adapter, Component, LowRank
from qrlora.merging._header import merged_header


def refactor(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The best approximation of an adapter's update at a rank, in every layer (Eckart and Young 1936), companions too.

    The truncated SVD of `dW = B A` is found from the QR decompositions of both factors, in fp64, without forming dW.
    A layer whose pair has a lower rank keeps that.

    Args:
        adapter: a low-rank adapter, such as one whose two factors were trained together, which has twice its rank.
        rank: at most this in every layer.

    Returns:
        The adapter, with `B` orthonormal and without a basis of its own, and the error `||dW - dW'||_F / ||dW||_F` over
        all layers together (0 for an update of zero).

    Raises:
        QrloraError: a rank below 1, or an adapter that is more than `W + B A`.
    """
    if rank < 1:
        raise QrloraError(f"an adapter of rank {rank} cannot be; give a rank of at least 1.")
    adapter.check_low_rank("brought to another rank")
    parts: dict[Component, Adapter] = {}
    lost = total = 0.0
    for component, part in adapter.components.items():
        layers: dict[str, LowRank] = {}
        for name, pair in part.layers.items():
            layers[name], values = _truncated(pair, rank)
            total += float(values.square().sum())
            lost += float(values[rank:].square().sum())
        largest = max(pair.rank for pair in layers.values())
        header = merged_header([part], [1.0], "refactor", rank=largest, keep_basis=False)
        parts[component] = replace(part, layers=layers, header=header)
    main = parts.pop(adapter.component)
    return replace(main, companions=parts), (lost / total) ** 0.5 if total else 0.0


def _truncated(pair: LowRank, rank: int) -> tuple[LowRank, Tensor]:
    """The pair at most `rank` wide, and all singular values of its product."""
    linalg = cast(Any, torch.linalg)
    b, b_core = cast(tuple[Tensor, Tensor], linalg.qr(pair.B.flatten(1).double()))
    a, a_core = cast(tuple[Tensor, Tensor], linalg.qr(pair.A.flatten(1).double().T))
    u, values, vh = cast(tuple[Tensor, Tensor, Tensor], linalg.svd(b_core @ a_core.T, full_matrices=False))
    kept = min(rank, len(values))
    B = (b @ u[:, :kept]).float().reshape(pair.B.shape[0], kept, *pair.B.shape[2:])
    A = (values[:kept, None] * (vh[:kept] @ a.T)).float().reshape(kept, *pair.A.shape[1:])
    return LowRank(B, A), values
