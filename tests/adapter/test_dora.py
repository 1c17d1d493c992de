"""DoRA: more than a LoRA, exact on any base, and the same whatever is active beside it."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qrlora.adapter import AdapterSpec, adapter_of, add_adapter, attach_adapter, set_adapters
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, read_peft_folder, write_peft_folder
from qrlora.merging import merge, refactor
from tests.adapter_forms import FEW, apply, lora_layers, shake, some_input, spec_for, with_form
from tests.adapters_of_data import dense, relative
from tests.tiny_models import inputs, output, run, tiny, tiny_flux


def test_dora_is_no_lora(tmp_path: Path) -> None:
    denoiser = with_form("dora")
    shake(denoiser)
    adapter = adapter_of(denoiser, "content")
    for action, doing in {
        "merged": lambda: merge([adapter, adapter]),
        "brought to another rank": lambda: refactor(adapter, 2),
        "saved as coefficients only": lambda: adapter.save(tmp_path / "c.safetensors", coefficients_only=True),
    }.items():
        with pytest.raises(QrloraError, match=f"is a dora adapter and cannot be {action}"):
            doing()
    with pytest.raises(QrloraError, match="cannot be fused"):
        denoiser.fuse_lora()
    again = read_peft_folder(write_peft_folder(adapter, tmp_path / "peft"))
    for layer, own in adapter.own.items():
        assert torch.equal(again.own[layer]["lora_magnitude_vector"], own["lora_magnitude_vector"])


def test_dora_starts_exactly_at_a_bf16_base_under_autocast() -> None:
    """peft's own takes norms in bf16 there, and does not."""
    denoiser: Any = tiny_flux().to(torch.bfloat16)
    given = inputs("flux")
    with torch.autocast("cpu", torch.bfloat16):
        base = output(denoiser, given)
        for name in ("dora", "both", "core"):
            add_adapter(denoiser, spec_for(name), name)
            assert torch.equal(output(denoiser, given), base)


def test_dora_leaves_a_row_of_zeros_alone() -> None:
    base = tiny_flux()
    layer = base.transformer_blocks[0].attn.to_q
    with torch.no_grad():
        layer.weight[3] = 0
    x = some_input(layer)
    before = layer(x)
    add_adapter(base, AdapterSpec(rank=2, basis="dora"), "drawn")
    assert torch.equal(base.transformer_blocks[0].attn.to_q(x), before)


class TestDoraBesideOthers:
    """Each adds what it would add alone, so the order does not count."""

    NAMES = ("first", "second", "plain")

    def made(self, kind: str) -> dict[str, Adapter]:
        adapters: dict[str, Adapter] = {}
        for seed, name in enumerate(self.NAMES):
            spec = spec_for("dora", kind, seed=seed)
            if name == "plain":
                spec = AdapterSpec(rank=4, basis="lora", target_modules=FEW[kind], seed=seed)
            denoiser = tiny(kind)
            add_adapter(denoiser, spec, "content")
            shake(denoiser, 0.3, seed)
            adapters[name] = adapter_of(denoiser, "content")
        return adapters

    def expected(self, base: nn.Module, adapters: dict[str, Adapter], weights: dict[str, float], path: str) -> Tensor:
        """`W + sum_i (W'_i - W)` as a matrix."""
        W = base.weight.detach().double().flatten(1)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        total = W
        for name, weight in weights.items():
            change = weight * dense(adapters[name], path)
            if name != "plain":
                magnitude = adapters[name].own[path]["lora_magnitude_vector"].double().reshape(-1, 1)
                change = magnitude * (W + change) / (W + change).norm(dim=1, keepdim=True) - W
            total = total + change
        return total

    @pytest.mark.parametrize("kind", FEW)
    def test_the_order_does_not_count(self, kind: str) -> None:
        adapters, weights = self.made(kind), {"first": 1.0, "second": 0.7, "plain": 0.5}
        results: list[dict[str, Tensor]] = []
        for order in permutations(self.NAMES):
            denoiser: Any = tiny(kind)
            for name in order:
                attach_adapter(denoiser, adapters[name], name)
            set_adapters(denoiser, {name: weights[name] for name in order})
            found: dict[str, Tensor] = {}
            for path, layer in lora_layers(denoiser).items():
                x = some_input(layer.get_base_layer())
                with torch.no_grad():
                    found[path] = layer(x)
                expected = self.expected(layer.get_base_layer(), adapters, weights, path)
                assert relative(found[path], apply(layer.get_base_layer(), expected, x)) < 1e-6
            results.append(found)
        for found in results[1:]:
            assert found.keys() == results[0].keys()
            assert all(relative(got, results[0][path]) < 1e-6 for path, got in found.items())

    def test_one_that_is_trained_behind_another_has_its_own_gradient(self) -> None:
        """That of what it does alone: the one before moves the output, not what this one adds to it."""
        adapters, gradients = self.made("flux"), {}
        for before in (None, "first"):
            denoiser: Any = tiny_flux()
            if before is not None:
                attach_adapter(denoiser, adapters[before], before)
            attach_adapter(denoiser, adapters["second"], "second", trainable=True, spec=spec_for("dora", seed=1))
            layer: Any = lora_layers(denoiser)["transformer_blocks.0.ff.net.2"]
            x = some_input(layer.get_base_layer()).requires_grad_()
            layer(x).sum().backward()
            gradients[before] = layer.lora_own["second"].lora_magnitude_vector.grad
            if before is None:
                alone = x.grad
            else:
                assert x.grad is not None
                base, first = tiny_flux(), adapters[before]
                W = dict(base.named_modules())["transformer_blocks.0.ff.net.2"].weight.detach().double()
                path = "transformer_blocks.0.ff.net.2"
                change = self.expected(dict(base.named_modules())[path], {"first": first}, {"first": 1.0}, path) - W
                assert relative(x.grad - alone, change.sum(dim=0).expand(3, -1)) < 1e-5
        assert relative(gradients["first"], gradients[None]) < 1e-5

    @pytest.mark.parametrize("order", [("plain", "dora"), ("dora", "plain")])
    def test_on_a_bf16_base(self, order: tuple[str, str]) -> None:
        """The base's part is computed again in the base's own precision."""
        denoiser: Any = tiny_flux().to(torch.bfloat16)
        before = output(denoiser, inputs("flux"))
        for name in order:
            add_adapter(denoiser, spec_for("dora") if name == "dora" else AdapterSpec(rank=4, basis="lora"), name)
        set_adapters(denoiser, dict.fromkeys(order, 1.0))
        assert torch.equal(output(denoiser, inputs("flux")), before)
        for under in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=under):
                run(denoiser, inputs("flux")).float().square().mean().backward()
