"""A QR basis for each spectral band of a weight."""

import torch
from torch import Tensor

from qrlora.basis._linalg import as_matrix, positive_qr
from qrlora.basis._precision import full_precision, solving_device


def qr_bands(weight: Tensor, vectors: Tensor, count: int, *, layer: str = "weight") -> Tensor:
    """`[Q_1 ... Q_n]`, where `Q_i R_i` is the QR decomposition of band i of the truncated SVD of a weight.

    Band i is `U_i S_i V_i^T = U_i U_i^T W`, so `Q_i = U_i Q'` with `Q' R' = U_i^T W`, `diag(R') > 0` (Freq-MoE).

    Arguments:
        weight: `[out, in]` or `[out, in, kh, kw]`.
        vectors: `U [out, r]`, its leading left singular vectors in order.
        count: how many equal bands; it divides r.
        layer: the name used in messages.

    Returns:
        `[out, r]`, orthonormal, fp32, on the device of `vectors`.

    Raises:
        QrloraError: an unsuitable weight.
    """
    device = solving_device(vectors.device)
    width = vectors.shape[1] // count
    with full_precision(device):
        matrix = as_matrix(weight, layer=layer)[:, :width].to(device, torch.float64)
        columns = vectors.to(device, torch.float64)
        bands = [columns[:, start : start + width] for start in range(0, width * count, width)]
        made = torch.cat([band @ positive_qr(band.T @ matrix) for band in bands], dim=1)
        return made.to(device=vectors.device, dtype=torch.float32)
