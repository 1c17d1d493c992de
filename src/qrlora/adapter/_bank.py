"""Many adapters beside one model, chosen anew for each picture of a batch without touching a layer; see `_mixed`."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qrlora.adapter._attach import check_fits
from qrlora.adapter._mixed import MixedComponent, Row
from qrlora.adapter._peft import component_of
from qrlora.adapter._weights import combined_hash
from qrlora.errors import QrloraError
from qrlora.formats import DENOISERS, TEXT_ENCODERS, Adapter, Component, check_weight


class AdapterBank:
    """Adapters beside a pipeline or a denoiser, as many as memory holds; the model itself stays as it is.

    Args:
        model: a diffusers pipeline, whose text encoders are adapted too where adapters have companions, or a denoiser.
        device: where adapters are kept; where the denoiser is, where None.
    """

    def __init__(self, model: Any, *, device: str | torch.device | None = None) -> None:
        self._modules = _components(model)
        self._device = None if device is None else torch.device(device)
        self._parts: dict[Component, MixedComponent] = {}
        self._names: dict[str, tuple[Component, ...]] = {}
        self._bases: set[str] = set()
        self._rows: tuple[Row, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters held."""
        return tuple(self._names)

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters held, with what they share counted once, without the sums for the rows chosen now."""
        layers = [layer for part in self._parts.values() for layer in part.layers.values()]
        groups = [group for layer in layers for group in layer.groups(self._names)]
        return sum(tensor.nbytes for group in groups for tensor in (group.shared, *group.own.values()))

    def adapts_words(self, name: str) -> bool:
        """Whether an adapter changes how prompts are read.

        Raises:
            QrloraError: no such adapter.
        """
        self._check_known(name)
        return any(component in TEXT_ENCODERS for component in self._names[name])

    def add(self, name: str, adapter: Adapter) -> None:
        """Take an adapter in; it acts once it is chosen.

        Raises:
            QrloraError: a name that is taken, an adapter that is more than `W + B A`, one of convolutions, or one that
                does not fit the model (see `check_fits`).
        """
        if name in self._names:
            raise QrloraError(f"there is already an adapter {name!r} in the bank; choose another name.")
        parts = adapter.components
        for component, part in parts.items():
            part.check_low_rank("mixed within a batch")
            for layer, pair in part.layers.items():
                if pair.A.ndim != 2:
                    raise QrloraError(
                        f"{adapter.label} adapts the convolution {layer}, and only Linear layers can be mixed within a "
                        "batch; use set_adapters, one picture at a time."
                    )
            self._check_fits(component, part)
        for component, part in parts.items():
            self._part(component).take(name, part)
        self._names[name] = tuple(parts)

    def remove(self, name: str) -> None:
        """Let an adapter go; nothing is chosen afterwards.

        Raises:
            QrloraError: no such adapter.
        """
        self._check_known(name)
        self.switch(())
        for component in self._names.pop(name):
            for layer in self._parts[component].layers.values():
                layer.remove(name)

    def switch(self, rows: Sequence[Row]) -> None:
        """Choose adapters and weights for each picture of the batches to come.

        Args:
            rows: one a picture, in the order of the batch; a batch may hold them several times over, one after the
                other (classifier-free guidance). One row is for all pictures, none is the base alone, bit for bit.

        Raises:
            QrloraError: an unknown name, or a weight that is not finite.
        """
        for row in rows:
            for name, weight in row.items():
                self._check_known(name)
                check_weight(weight)
        self._rows = tuple(rows)
        for part in self._parts.values():
            part.choose(self._rows)

    @contextmanager
    def rows(self, rows: Sequence[Row]) -> Generator[None]:
        """Within this context the rows are these (see `switch`), afterwards what they were."""
        before = self._rows
        self.switch(rows)
        try:
            yield
        finally:
            self.switch(before)

    def close(self) -> None:
        """Let all adapters go, and leave the model without a trace."""
        for part in self._parts.values():
            part.detach()
        self._parts.clear()
        self._names.clear()
        self._rows = ()

    def _check_known(self, name: str) -> None:
        if name not in self._names:
            raise QrloraError(
                f"there is no adapter {name!r} in the bank; there are: {', '.join(self._names) or 'none'}."
            )

    def _module(self, component: Component) -> nn.Module:
        if component not in self._modules:
            raise QrloraError(f"the adapter adapts the {component}, which is not there; give the whole pipeline.")
        return self._modules[component]

    def _check_fits(self, component: Component, part: Adapter) -> None:
        """The base is looked at once, not once an adapter."""
        base = None if part.header is None else combined_hash(part.header.weight_hashes)
        check_fits(self._module(component), replace(part, header=None) if base in self._bases else part)
        if base is not None:
            self._bases.add(base)

    def _part(self, component: Component) -> MixedComponent:
        if component not in self._parts:
            module: Any = self._module(component)
            self._parts[component] = MixedComponent(module, self._device or torch.device(module.device), module.dtype)
        return self._parts[component]


def _components(model: Any) -> dict[Component, nn.Module]:
    if isinstance(model, nn.Module):
        return {component_of(model): model}
    found: dict[Component, Any] = {name: getattr(model, name, None) for name in (*DENOISERS, *TEXT_ENCODERS)}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}
