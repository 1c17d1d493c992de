"""Telling bases and weights apart without storing them: fingerprints, alignment and hashes."""

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from qrlora.basis._linalg import gaussian, norms, svd
from qrlora.basis._precision import full_precision, solving_device
from qrlora.errors import QrloraError

_HASHED_ELEMENTS = 1 << 14


def fingerprint(vectors: Tensor, seed: int = 0) -> Tensor:
    """`G^T Q / sqrt(r)`, with `G [d, r]` a seeded standard Gaussian: enough to find Q again within its span (`align`).

    Of `r^2` numbers, `r (r + 1) / 2` test the span; at r = 1 that is a single one, so a chance match within 1e-3 is
    possible there.

    Arguments:
        vectors: `Q [d, r]`, orthonormal columns or not.
        seed: of G; the same for `align`.

    Returns:
        `[r, r]`, in fp32 on the device of `vectors` (fp64 for fp64 vectors).
    """
    device = solving_device(vectors.device)
    with full_precision(device):
        return _sketch(vectors.detach().to(device).double(), seed).to(_like(vectors))


def align(vectors: Tensor, fingerprint: Tensor, seed: int = 0, *, orthonormal: bool = True) -> tuple[Tensor, float]:
    """A recomputed basis, rotated within its span to the fingerprinted one (orthogonal Procrustes, Schonemann 1966).

    The columns of a basis that is not orthonormal are defined one by one: they are compared as they are, not rotated.

    Arguments:
        vectors: `[d, r]`, of the span, or with the columns, that is hoped to be the same.
        fingerprint: `[r, r]`, `fingerprint(Q, seed)` of the basis wanted.
        seed: as for `fingerprint`.
        orthonormal: whether the columns are.

    Returns:
        The rotated vectors, in the dtype of `vectors`, and the misfit `||G^T V O - F||_F / ||F||_F`: about the angle
        between the spans in radians; above 1e-3 it is another span.

    Raises:
        QrloraError: the fingerprint's shape is not `[r, r]`, or it is zero or not finite.
    """
    rank = vectors.shape[1]
    if tuple(fingerprint.shape) != (rank, rank):
        raise QrloraError(
            f"a fingerprint of shape {tuple(fingerprint.shape)} does not fit a basis of rank {rank}; "
            "use the rank it was made with."
        )
    device = solving_device(vectors.device)
    with full_precision(device):
        basis = vectors.detach().to(device).double()
        wanted = fingerprint.detach().to(device).double()
        size = float(norms(wanted.flatten()))
        if not math.isfinite(size) or size == 0.0:
            raise QrloraError("the fingerprint is zero or not finite; the file that holds it is damaged.")
        sketch = _sketch(basis, seed)
        if not orthonormal:
            return vectors.to(_like(vectors)), float(norms((sketch - wanted).flatten())) / size
        left, _, right = svd(sketch.T @ wanted)
        rotation = left @ right
        misfit = float(norms((sketch @ rotation - wanted).flatten())) / size
        return (basis @ rotation).to(_like(vectors)), misfit


def weight_hash(weight: Tensor) -> str:
    """A short hash of a weight's shape, dtype and values, cheap for any size.

    SHA-256 over the shape, the dtype and the raw bytes of up to 16384 elements at fixed positions spread over the
    weight (all of them in a smaller one), so another model or a fine-tuned weight is told apart, a single changed
    element of a large weight may not be.

    Returns:
        32 hexadecimal digits.

    Raises:
        QrloraError: the weight is on the meta device.
    """
    if weight.is_meta:
        raise QrloraError("a weight on the meta device has no values to hash; load the base model's weights first.")
    flat = weight.detach().reshape(-1)
    if flat.numel() > _HASHED_ELEMENTS:
        flat = flat[_spread(flat.numel()).to(flat.device)]
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype} ".encode())
    digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


@lru_cache(maxsize=8)
def _spread(count: int) -> Tensor:
    """Fixed, distinct positions below `count` by golden-ratio steps: a plain stride could see only a few columns."""
    step = int(count * 0.6180339887498949)
    while math.gcd(step, count) != 1:
        step += 1
    return torch.arange(_HASHED_ELEMENTS, dtype=torch.int64, device="cpu") * step % count


def _sketch(basis: Tensor, seed: int) -> Tensor:
    d, rank = basis.shape
    return _drawn(d, rank, seed, basis.device).T @ basis / math.sqrt(rank)


@lru_cache(maxsize=4)
def _drawn(d: int, rank: int, seed: int, device: torch.device) -> Tensor:
    """The layers of a model have few shapes, and drawing takes longer than the product."""
    return gaussian(d, rank, seed).to(device)


def _like(vectors: Tensor) -> Tensor:
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    return torch.empty(0, dtype=dtype, device=vectors.device)
