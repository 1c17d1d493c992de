"""Which experts a gated adapter uses, gathered while it works."""

import json
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qrlora.adapter._peft import lora_layers, record_of
from qrlora.adapter._variant import held_by
from qrlora.adapter.forms.gated import GatedForm, gate_weights
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, atomic_write


@dataclass
class _Sums:
    gates: Tensor  # [experts]
    entropy: Tensor
    tokens: int = 0


class GateUsage:
    """Mean gate weights of one gated adapter by layer, over all tokens that passed; see `record_usage`.

    Attributes:
        name: the adapter's name.
    """

    def __init__(self, name: str, layers: Iterable[str]) -> None:
        self.name = name
        self._order = list(layers)
        self._sums: dict[str, _Sums] = {}

    def add(self, layer: str, gates: Tensor) -> None:
        """Count the gate weights `[..., experts]` of some tokens; only their sums are kept."""
        flat = gates.detach().float().flatten(0, -2)
        entropy = -torch.xlogy(flat, flat).sum()
        if layer not in self._sums:
            self._sums[layer] = _Sums(torch.zeros_like(flat[0]), torch.zeros_like(entropy))
        sums = self._sums[layer]
        sums.gates += flat.sum(dim=0)
        sums.entropy += entropy
        sums.tokens += flat.shape[0]

    @property
    def layers(self) -> list[str]:
        """Paths of the layers that any token passed, in the order of the model."""
        return [layer for layer in self._order if layer in self._sums]

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens passed each layer, all steps together."""
        return {layer: self._sums[layer].tokens for layer in self.layers}

    @property
    def weights(self) -> list[list[float]]:
        """The mean weight of every expert, a row a layer."""
        found = [self._sums[layer] for layer in self.layers]
        return [[float(total) / sums.tokens for total in sums.gates.cpu()] for sums in found]

    @property
    def entropies(self) -> list[float]:
        """The mean entropy of one token's gate weights, in nats, a number a layer: 0 where a token uses one expert.

        The entropy of the mean weights is another thing: tokens can be certain, each of another expert.
        """
        found = [self._sums[layer] for layer in self.layers]
        return [float(sums.entropy) / sums.tokens for sums in found]

    def save(self, path: str | Path) -> Path:
        """Write name, layers and weights as JSON, as `qrlora analyze` reads them.

        Raises:
            QrloraError: no token has passed, or the file cannot be written.
        """
        if not self._sums:
            raise QrloraError(f"no token has passed the gates of {self.name!r}; make pictures while recording.")
        content = {"name": self.name, "layers": self.layers, "weights": self.weights}
        return atomic_write(path, json.dumps(content, indent=1) + "\n")


def is_gated(adapter: Adapter) -> bool:
    """Whether its layers have gates, so that `record_usage` can count what they choose."""
    return adapter.form == GatedForm.name


@contextmanager
def record_usage(denoiser: nn.Module, adapter_name: str) -> Generator[GateUsage]:
    """Within this context, gather how much a gated adapter uses its experts; no activations are kept.

    Each layer's gate is computed a second time, which costs little beside the layer. What passes while the adapter is
    inactive or disabled is not counted.

    Args:
        denoiser: the denoiser that carries it.
        adapter_name: its name there.

    Returns:
        The usage, which grows while the context lasts and stays readable after it.

    Raises:
        QrloraError: no such adapter, or it has no gates.
    """
    layers = lora_layers(denoiser, adapter_name)
    if record_of(denoiser, adapter_name).form != GatedForm.name:
        raise QrloraError(f"adapter {adapter_name!r} has no gates; only gated adapters use experts.")
    usage = GateUsage(adapter_name, layers)
    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = cast(Any, layer).register_forward_pre_hook(_counting(usage, adapter_name, name))
            stack.callback(hook.remove)
        yield usage


def _counting(usage: GateUsage, adapter_name: str, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def count(module: nn.Module, given: tuple[Any, ...]) -> None:
        layer = cast(LoraLayer, module)
        if layer.disable_adapters or adapter_name not in layer.active_adapters:
            return
        held = held_by(layer, adapter_name, name, 1.0, "output")
        x = cast(Tensor, given[0])
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            usage.add(name, gate_weights(held, x.to(held.A.dtype)))

    return count
