"""Weights with known singular values, and float64 numpy references that share no code with qrlora."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def with_values(d: int, n: int, values: Array, seed: int = 0) -> Array:
    """`[d, n]` with Haar-random singular vectors and the given min(d, n) singular values."""
    rng = np.random.default_rng(seed)
    k = min(d, n)
    u = np.linalg.qr(rng.standard_normal((d, k)))[0]
    v = np.linalg.qr(rng.standard_normal((n, k)))[0]
    return (u * values) @ v.T


def power_law(d: int, n: int, seed: int = 0, exponent: float = -0.5) -> Array:
    return with_values(d, n, np.arange(1, min(d, n) + 1, dtype=np.float64) ** exponent, seed)


def reference(weight: Tensor, side: str = "output") -> tuple[Array, Array, Array]:
    """float64 thin SVD of the stored values, wanted side first."""
    matrix = weight.detach().double().reshape(weight.shape[0], -1).numpy()
    return np.linalg.svd(matrix if side == "output" else matrix.T, full_matrices=False)


def degrees(a: Tensor | Array, b: Tensor | Array) -> float:
    """Largest principal angle, through the part of b outside span(a), in float64."""
    first = np.linalg.qr(np.asarray(a, dtype=np.float64))[0]
    second = np.linalg.qr(np.asarray(b, dtype=np.float64))[0]
    sine = np.linalg.svd(second - first @ (first.T @ second), compute_uv=False)[0]
    return float(np.degrees(np.arcsin(min(1.0, sine))))


def off_orthonormal(vectors: Tensor) -> float:
    v = vectors.double()
    return float((v.T @ v - torch.eye(v.shape[1], dtype=torch.float64)).abs().max())


def tensor(array: Array, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(array).to(dtype)
