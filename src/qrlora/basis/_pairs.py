"""Pairs of factors `(L, R)` derived from a weight, from which an adapter starts or between which it has a core."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qrlora.basis._linalg import gaussian, norms, positive_qr, times
from qrlora.basis._precision import full_precision
from qrlora.basis._subspace import Side, oriented
from qrlora.errors import QrloraError

PROJECTION = "projection"
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class PairRequest:
    """What a pair function works from."""

    matrix: Tensor
    """`W [out, n]`, finite, fp32 or fp64, read only."""
    rank: int
    vectors: Tensor | None
    """`Q [d, rank]` in fp64 of the basis that the pair was registered with, d = out or n by `side`."""
    side: Side
    seed: int


PairFunction = Callable[[PairRequest], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Entry:
    function: PairFunction
    basis: str | None


_registry: dict[str, _Entry] = {}


def register_pair(name: str, *, basis: str | None) -> Callable[[PairFunction], PairFunction]:
    """Decorator that makes a function available as the pair `name`.

    Arguments:
        name: what `AdapterSpec.basis` calls it, beside the bases, each of which has the pair of its projection.
        basis: the basis whose vectors the function gets; None where it needs none.

    Raises:
        QrloraError: the name is taken.
    """

    def register(function: PairFunction) -> PairFunction:
        if name in _registry:
            raise QrloraError(f"a pair named {name!r} is registered already; choose another name.")
        _registry[name] = _Entry(function, basis)
        return function

    return register


def pair_names() -> tuple[str, ...]:
    """The registered names, sorted, without the projection that every basis has."""
    return tuple(sorted(name for name in _registry if name != PROJECTION))


def pair_basis(name: str) -> str | None:
    """The basis whose vectors `make_pair` needs for the pair `name`; the basis itself for a projection."""
    return _registry[name].basis if name in _registry else name


def make_pair(
    weight: Tensor,
    rank: int,
    name: str = PROJECTION,
    *,
    vectors: Tensor | None = None,
    side: Side = "output",
    seed: int = 0,
    layer: str = "weight",
) -> tuple[Tensor, Tensor]:
    """The pair `name` of a weight W.

    `projection` (also by the name of a basis without a pair of its own): `(Q, Q^T W)` for side output, `(W Q, Q^T)` for
    input, which for the svd basis is LoRA-XS's `(U_r, S_r V_r^T)` (arXiv 2405.17604). `random`: two random orthonormal
    frames. `pissa`: `(U_r S_r^1/2, S_r^1/2 V_r^T)` (arXiv 2404.02948). `olora`: `(Q[:, :r], R[:r])` of `Q R = W` (arXiv
    2406.01775).

    Arguments:
        weight: `[out, in]` or `[out, in, kh, kw]`, any floating dtype and device; never modified.
        rank: r.
        name: as above.
        vectors: `[d, r]` of `pair_basis(name)`, on `side`.
        side: of the vectors; without meaning for olora.
        seed: of the random pair.
        layer: the name used in messages.

    Returns:
        `L [out, r]` and `R [r, in * kh * kw]`, fp32, on the weight's device.

    Raises:
        QrloraError: non-finite values or an unsuitable weight.
    """
    matrix = oriented(weight, "output", layer)
    entry = _registry.get(name) or _registry[PROJECTION]
    known = None if vectors is None else vectors.to(matrix.device).double()
    with full_precision(matrix.device):
        left, right = entry.function(PairRequest(matrix, rank, known, side, seed))
        return (
            left.to(weight.device, torch.float32).contiguous(),
            right.to(weight.device, torch.float32).contiguous(),
        )


def _given(request: PairRequest) -> Tensor:
    assert request.vectors is not None, "this pair is made from the vectors of a basis"
    return request.vectors


@register_pair(PROJECTION, basis=None)
def projection(request: PairRequest) -> tuple[Tensor, Tensor]:
    """`Q` and what is left of W in its span."""
    q = _given(request)
    if request.side == "output":
        return q, times(request.matrix.T, q).T
    return times(request.matrix, q), q.T


@register_pair("random", basis="random")
def random(request: PairRequest) -> tuple[Tensor, Tensor]:
    """The random basis of the side, and another random frame for the other side."""
    q = _given(request)
    other = request.matrix.shape[1 if request.side == "output" else 0]
    frame = positive_qr(gaussian(other, request.rank, request.seed + 1)).to(q.device)
    return (q, frame.T) if request.side == "output" else (frame, q.T)


@register_pair("pissa", basis="svd")
def pissa(request: PairRequest) -> tuple[Tensor, Tensor]:
    """The principal singular triplets, their values shared evenly between the factors."""
    left, right = projection(request)
    if request.side == "output":
        values = norms(right.T)
        return left * values.sqrt(), right / values.clamp_min(_TINY).sqrt()[:, None]
    values = norms(left)
    return left / values.clamp_min(_TINY).sqrt(), right * values.sqrt()[:, None]


@register_pair("olora", basis=None)
def olora(request: PairRequest) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R, which need the first r columns of W alone; `diag(R) >= 0`."""
    q = positive_qr(request.matrix[:, : request.rank].double())
    return q, times(request.matrix.T, q).T
