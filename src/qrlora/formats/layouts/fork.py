"""The layouts of the published code's Stable Diffusion 3 fork: its keys, for bases that the keys do not tell."""

from collections.abc import Mapping

from torch import Tensor

from qrlora.formats._adapter import Adapter
from qrlora.formats._layout import AdapterFile, Evidence, Layout, ReadOptions, register_layout
from qrlora.formats.layouts import _q_and_delta as stored

BASES = ("qr", "svd", "ica")
_GATED = "moe"


class Fork(Layout):
    """`lora.q` and `lora.delta_r` of QR-, SVD- or ICA-LoRA; with `gate` too, of Freq-MoE."""

    name = "fork"
    takes = frozenset({"basis", "lora_alpha", "top_k"})
    title = "QR-LoRA fork for Stable Diffusion 3"

    def detect(self, file: AdapterFile, options: ReadOptions) -> Evidence | None:
        gates = stored.gates_of(file)
        keys = [*stored.keys_of(file), *gates]
        published = options.basis == "qr" or (options.basis is None and stored.adapts_flux(file))
        if not keys or (published and not gates):
            return None
        return Evidence(len(keys), f"{len(keys)} keys end in .lora.q, .delta_r or .base_r, or belong to a gate")

    def needs(self, file: AdapterFile, options: ReadOptions) -> str | None:
        gates = stored.gates_of(file)
        if gates and options.basis not in (None, _GATED):
            return f"has gates ({next(iter(gates))}), so it is a Freq-MoE adapter; its basis is {_GATED} (--basis)"
        if not gates and options.basis == _GATED:
            return f"has no gates, so it is no Freq-MoE adapter; its basis is one of {', '.join(BASES)} (--basis)"
        if not gates and options.basis is None:
            return (
                "has keys (lora.q, lora.delta_r) that do not say which basis they mean; say which it was trained with: "
                f"basis={', '.join(BASES)} or {_GATED} (qrlora export --basis)"
            )
        if not gates and options.basis not in BASES:
            return f"cannot be read with basis {options.basis!r}; use one of {', '.join(BASES)}, {_GATED}"
        return None

    def match(self, file: AdapterFile, options: ReadOptions) -> Mapping[str, str]:
        return stored.keys_of(file) | stored.gates_of(file)

    def build(self, file: AdapterFile, tensors: Mapping[str, Tensor], options: ReadOptions) -> Adapter:
        if stored.gates_of(file):
            return stored.with_gates(
                file, tensors, stored.assemble(file, tensors, "qr", options.lora_alpha), options.top_k
            )
        assert options.basis is not None  # `needs` said so
        return stored.assemble(file, tensors, options.basis, options.lora_alpha)


register_layout(Fork())
