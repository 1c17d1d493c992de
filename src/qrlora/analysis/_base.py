"""`R = Q^T W`: what the base itself has along an adapter's basis."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qrlora.adapter import adaptable_layers, check_base, dense_weight
from qrlora.analysis._spaces import Factors
from qrlora.basis import Side
from qrlora.errors import QrloraError
from qrlora.formats import Adapter


class BaseWeights:
    """The base model of some adapters, from which `R` of their bases follows, layer by layer."""

    def __init__(self, denoiser: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Check that it is their base.

        Args:
            denoiser: with or without adapters on it.
            adapters: by the names that messages give them.

        Raises:
            QrloraError: another base model than a header's hashes say, or a layer that it lacks.
        """
        self._modules = adaptable_layers(denoiser)
        for name, adapter in adapters.items():
            for layer in adapter.layers:
                if layer not in self._modules:
                    raise QrloraError(f"the model has no layer {layer}, which {name} adapts; give its own base model.")
                has = tuple(dense_weight(self._modules[layer], layer).shape)
                if has != adapter.layers[layer].shape:
                    raise QrloraError(
                        f"{name} adapts {layer} as a weight of shape {list(adapter.layers[layer].shape)}, but in the "
                        f"model it has {list(has)}; give its own base model."
                    )
            if adapter.header is not None:
                check_base(self._modules, adapter.header.weight_hashes, name)

    def coefficients(self, layer: str, factors: Factors, side: Side) -> Tensor:
        """`R` as `[channels, components]`, float64: `W^T Q` (side output) or `W V` (side input)."""
        weight = dense_weight(self._modules[layer], layer).detach().to("cpu", torch.float64).flatten(1)
        return weight.T @ factors.output if side == "output" else weight @ factors.input
