"""Independent component analysis of a weight: FastICA in fp64, the same on every run."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qrlora.basis._linalg import LinAlgError, gaussian, norms, svd, symmetric
from qrlora.basis._precision import full_precision, solving_device
from qrlora.errors import QrloraError, QrloraWarning

COMPONENTS_PER_RANK = 16
ITERATIONS = 100
TOLERANCE = 1e-3
_START_SEED = 0


@dataclass(frozen=True)
class Components:
    """`W = sources mixing^T + mean + what was left out`, each pair of columns of equal norms, by descending energy."""

    sources: Tensor
    """`S [out, r]`, fp64."""
    mixing: Tensor
    """`A [in, r]`, fp64, the entry of largest magnitude of every column positive."""
    drift: float
    """`max |1 - |w_new . w_old||` of the last iteration; `TOLERANCE` or more where it did not converge."""


@dataclass(frozen=True)
class _Whitened:
    data: Tensor  # [n, out], unit covariance
    axes: Tensor  # [in, n], principal axes
    values: Tensor  # [n], singular values of the centred weight


def independent_components(weight: Tensor, rank: int, *, layer: str = "weight") -> Components:
    """FastICA of a weight whose rows are the samples (Hyvarinen and Oja 2000, symmetric, tanh), `rank` components kept.

    The rows are centred, whitened to the leading `16 * rank` principal components (as far as the weight has them), and
    unmixed by at most 100 iterations. Components are sorted by the energy of their mixing column at unit variance of
    the source, then scaled so that a source and its mixing column have one norm.

    The start is a fixed Gaussian over the input features, projected on the principal axes, so the result depends
    neither on a random state nor on the signs that a decomposition happens to return.

    Arguments:
        weight: `[out, in]`, finite.
        rank: components kept, at most min(out, in) - 1.
        layer: the name used in messages.

    Returns:
        The components, on the weight's device (on the CPU for mps, which has no fp64). Where the iteration did not
        converge, a `QrloraWarning` says so.

    Raises:
        QrloraError: the centred weight has fewer than `rank` principal components.
    """
    device = solving_device(weight.device)
    with full_precision(device):
        whitened = _whiten(weight.detach().to(device), rank, layer)
        n, axes = whitened.data.shape[0], whitened.axes
        start = gaussian(n, axes.shape[0], _START_SEED).to(device) @ axes
        try:
            unmixing, drift = _unmix(whitened.data, start, ITERATIONS)
        except LinAlgError as error:
            raise QrloraError(f"{layer}: FastICA met a decomposition that does not converge ({error}).") from error
        if drift >= TOLERANCE:
            warnings.warn(
                f"{layer}: FastICA did not converge in {ITERATIONS} iterations (the last one moved a component by "
                f"{drift:.1e}, {TOLERANCE:.0e} is wanted); its components are a fixed, valid basis, but not "
                "independent ones.",
                QrloraWarning,
                stacklevel=2,
            )
        return _kept(whitened, unmixing, rank, drift)


def ica_seconds(shapes: Sequence[tuple[int, int]], rank: int, device: torch.device) -> float:
    """About how long FastICA takes at most on weights of these shapes `[out, in]`: one iteration of the first is timed.

    The others follow by their operation counts; a run that converges early takes less.
    """
    if not shapes:
        return 0.0
    place = solving_device(device)
    out, n = shapes[0][0], _count(shapes[0], rank)
    with full_precision(place):
        start = gaussian(n, n, _START_SEED).to(place)
        data = gaussian(n, out, _START_SEED + 1).to(place)
        _unmix(data, start, 1)  # the first call also loads kernels
        _wait(place)
        started = time.perf_counter()
        _unmix(data, start, 1)
        _wait(place)
        once = time.perf_counter() - started
    return once * sum(_operations(shape, rank) for shape in shapes) / _iteration_operations(out, n)


def _count(shape: tuple[int, int], rank: int) -> int:
    """How many components are looked for; centring takes one degree of freedom off the samples."""
    out, inputs = shape
    return max(1, min(COMPONENTS_PER_RANK * rank, out - 1, inputs))


def _iteration_operations(out: int, n: int) -> float:
    return 4.0 * n * n * out + 12.0 * n**3


def _operations(shape: tuple[int, int], rank: int) -> float:
    small, large = sorted(shape)
    return ITERATIONS * _iteration_operations(shape[0], _count(shape, rank)) + 6.0 * large * small**2 + 20.0 * small**3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _whiten(weight: Tensor, rank: int, layer: str) -> _Whitened:
    # Below this a singular value is the rounding of the weight, which whitening would blow up to a component.
    eps = torch.finfo(torch.float64 if weight.dtype == torch.float64 else torch.float32).eps
    matrix = weight.double()
    noise = 8 * eps * float(norms(matrix.flatten()))
    centred = matrix - matrix.mean(dim=0)
    try:
        left, values, right = svd(centred)
    except LinAlgError as error:
        raise QrloraError(f"{layer}: the principal components of the weight do not converge ({error}).") from error
    n = min(_count((matrix.shape[0], matrix.shape[1]), rank), int((values > noise).sum()))
    if n < rank:
        raise QrloraError(
            f"{layer}: the centred weight has only {n} principal components, fewer than the rank {rank}; lower the "
            "rank or leave the layer out of target_modules."
        )
    return _Whitened(left[:, :n].T.contiguous() * matrix.shape[0] ** 0.5, right[:n].T, values[:n])


def _unmix(data: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, float]:
    """Orthonormal rows `[n, n]` whose products with whitened `data [n, samples]` are as independent as can be, and how
    much the last iteration still moved one of them."""
    samples = data.shape[1]
    rows, drift = _decorrelated(start), float("inf")
    for _ in range(iterations):
        activity = (rows @ data).tanh_()
        slope = 1 - activity.square().mean(dim=1, keepdim=True)
        fresh = _decorrelated(activity @ data.T / samples - slope * rows)
        drift = float(((fresh * rows).sum(dim=1).abs() - 1).abs().max())
        rows = fresh
        if drift < TOLERANCE:
            break
    return rows, drift


def _decorrelated(rows: Tensor) -> Tensor:
    """`(W W^T)^(-1/2) W`: the nearest orthonormal rows."""
    values, vectors = symmetric(rows @ rows.T)
    roots = values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    return (vectors * roots) @ vectors.T @ rows


def _kept(whitened: _Whitened, unmixing: Tensor, rank: int, drift: float) -> Components:
    samples = whitened.data.shape[1]
    mixing = (whitened.axes * whitened.values) @ unmixing.T / samples**0.5
    energies = norms(mixing)
    order = torch.argsort(energies, descending=True, stable=True)[:rank]
    mixing, unmixing, energies = mixing[:, order], unmixing[order], energies[order]
    sources = whitened.data.T @ unmixing.T
    peaks = mixing.gather(0, mixing.abs().argmax(dim=0, keepdim=True))
    # One factor takes what the other gives: the product, a component of W, stays as it is.
    balance = (norms(sources) / energies).sqrt() * torch.where(peaks < 0, -1.0, 1.0)
    return Components(sources / balance, mixing * balance, drift)
