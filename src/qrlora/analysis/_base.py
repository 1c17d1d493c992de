"""`R = Q^T W`: what the base itself has along an adapter's basis."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qrlora.adapter import adaptable_layers, check_fits, dense_weight
from qrlora.analysis._spaces import Factors
from qrlora.basis import Side
from qrlora.formats import Adapter


class BaseWeights:
    """The base model of some adapters, from which `R` of their bases follows, layer by layer."""

    def __init__(self, denoiser: nn.Module, adapters: Iterable[Adapter]) -> None:
        """Check that it is their base.

        Args:
            denoiser: with or without adapters on it.
            adapters: all that are compared.

        Raises:
            QrloraError: what `check_fits` refuses.
        """
        self._modules = adaptable_layers(denoiser)
        for adapter in adapters:
            check_fits(denoiser, adapter)

    def coefficients(self, layer: str, factors: Factors, side: Side) -> Tensor:
        """`R` as `[channels, components]`, float64: `W^T Q` (side output) or `W V` (side input)."""
        weight = dense_weight(self._modules[layer], layer).detach().to("cpu", torch.float64).flatten(1)
        return weight.T @ factors.output if side == "output" else weight @ factors.input
