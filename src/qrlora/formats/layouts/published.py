"""The two layouts of the published QR-LoRA code for FLUX (arXiv 2507.04599).

`transformer.{layer}.lora.{q,delta_r,base_r}.weight`, where `dW = s Q dR` and base_r (Q^T W) is redundant; and, of the
script that trains Q and R together, `transformer.{layer}.lora.{up,down}.weight`, where `dW = s (B A - Q R)`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from qrlora.basis import make_basis
from qrlora.errors import QrloraError
from qrlora.formats._adapter import Adapter, LowRank, check_pair
from qrlora.formats._factors import natural_key
from qrlora.formats._layout import AdapterFile, Evidence, Layout, ReadOptions, register_layout
from qrlora.formats.layouts import _q_and_delta as stored
from qrlora.formats.layouts._spelled import check_floating

_UP_DOWN = re.compile(r"transformer\.(.+)\.lora\.(up|down)\.weight")
_DOUBLED = ".to_out.0.to_out.0"


class Published(Layout):
    """Q and dR, with the scale `lora_alpha / rank`, which the file does not say."""

    name = "published"
    takes = frozenset({"basis", "lora_alpha"})
    title = "published QR-LoRA code"

    def detect(self, file: AdapterFile, options: ReadOptions) -> Evidence | None:
        keys, residuals = stored.keys_of(file), stored.residuals_of(file)
        if not keys and residuals:
            return Evidence(len(residuals), f"{len(residuals)} keys end in .residual.weight")
        if not keys or options.basis not in (None, "qr") or stored.gates_of(file):
            return None
        flux = stored.adapts_flux(file)
        if not flux and options.basis is None:
            return None
        why = "FLUX alone has some of the layers" if flux else "the basis is said to be qr"
        return Evidence(len(keys), f"{len(keys)} keys end in .lora.q, .delta_r or .base_r, and {why}")

    def needs(self, file: AdapterFile, options: ReadOptions) -> str | None:
        if stored.residuals_of(file) and not stored.keys_of(file, redundant=False):
            return "holds residuals of base weights and no adapter; give the file that was saved beside it"
        return None

    def match(self, file: AdapterFile, options: ReadOptions) -> Mapping[str, str]:
        return stored.keys_of(file)

    def build(self, file: AdapterFile, tensors: Mapping[str, Tensor], options: ReadOptions) -> Adapter:
        return stored.assemble(file, tensors, "qr", options.lora_alpha)


class PublishedQR(Layout):
    """Both factors trained from `B = Q, A = R`; what stock loaders make of the file is wrong by the base's `Q R`."""

    name = "published-qr"
    takes = frozenset({"lora_alpha"})
    title = "published QR-LoRA code, Q and R trained together"

    def detect(self, file: AdapterFile, options: ReadOptions) -> Evidence | None:
        keys = _up_down(file)
        if not keys:
            return None
        doubled = any(_DOUBLED in key for key in keys)
        why = "to_out.0 is doubled, as that script does" if doubled else "that is how that script spells them"
        return Evidence(len(keys), f"{len(keys)} keys are spelled transformer.LAYER.lora.up or .down, and {why}")

    def needs(self, file: AdapterFile, options: ReadOptions) -> str | None:
        if options.base is None:
            return (
                "was trained from the base's own Q and R, which must be taken off again, so it needs its base model: "
                "give base= (qrlora export --model)"
            )
        return None

    def match(self, file: AdapterFile, options: ReadOptions) -> Mapping[str, str]:
        return {key: layer for key, (layer, _) in _up_down(file).items()}

    def build(self, file: AdapterFile, tensors: Mapping[str, Tensor], options: ReadOptions) -> Adapter:
        assert options.base is not None  # `needs` said so
        found: dict[str, dict[str, Tensor]] = {}
        for key, (layer, factor) in _up_down(file).items():
            if factor in found.setdefault(layer, {}):
                raise QrloraError(f"{file.source} has {layer}.{factor} twice, once with to_out.0 doubled.")
            check_floating(file.source, key, tensors[key])
            found[layer][factor] = tensors[key].float()
        layers: dict[str, LowRank] = {}
        for layer in sorted(found, key=natural_key):
            if len(found[layer]) < 2:
                raise QrloraError(f"{file.source} has only one of {layer}.lora.up and .lora.down; it is incomplete.")
            trained = LowRank(found[layer]["up"], found[layer]["down"])
            check_pair(f"{file.source}: {layer}", trained)
            layers[layer] = _update(f"{file.source}: {layer}", trained, options.base(layer), options.lora_alpha)
        return Adapter(layers, None, "transformer", source=str(file.source))


def _update(label: str, trained: LowRank, weight: Tensor, lora_alpha: float | None) -> LowRank:
    """`s (B A - Q R)` at rank 2 r."""
    if tuple(weight.shape) != trained.shape or weight.ndim != 2:
        raise QrloraError(
            f"{label} adapts a weight of shape {list(trained.shape)}, but the base model's has {list(weight.shape)}; "
            "give the base model it was trained on."
        )
    rank = trained.rank
    Q = make_basis(weight.float(), rank, "qr", layer=label).vectors
    R = (Q.double().T @ weight.double().to(Q.device)).float()
    scale = 1.0 if lora_alpha is None else lora_alpha / rank
    return LowRank(torch.cat([trained.B, Q.cpu()], dim=1), torch.cat([scale * trained.A, -scale * R.cpu()]))


def _up_down(file: AdapterFile) -> dict[str, tuple[str, str]]:
    """Key to (layer, up or down)."""
    found = {key: match for key in file.entries if (match := _UP_DOWN.fullmatch(key))}
    return {key: (match[1].replace(_DOUBLED, ".to_out.0"), match[2]) for key, match in found.items()}


register_layout(Published())
register_layout(PublishedQR())
