"""A new adapter on real components: exact start, exact formula, frozen basis, mask, and every refusal."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qrlora.adapter import (
    AdapterSpec,
    adapters_disabled,
    add_adapter,
    remove_adapter,
    set_adapters,
    trainable_parameters,
)
from tests.tiny_models import FLUX_TARGETS, TARGETS, inputs, output, run, tiny, tiny_flux

KINDS = tuple(TARGETS)


def spec_for(kind: str, **fields: Any) -> AdapterSpec:
    return AdapterSpec(**({"rank": 6, "target_modules": TARGETS[kind]} | fields))


def shake(denoiser: nn.Module, name: str, size: float = 0.05, seed: int = 3) -> None:
    """Give the trained factors values, as training would; masked entries stay zero."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in trainable_parameters(denoiser, name).items():
        noise = torch.randn(parameter.shape, generator=generator).flatten(1) * size
        kept = (noise.triu() if "lora_A" in key else noise.tril()).reshape(parameter.shape)
        parameter.data.copy_(kept)


def lora_layers(denoiser: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", ["qr", "svd", "minor", "random", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_starts_from_exactly_the_base(kind: str, basis: str, dtype: torch.dtype) -> None:
    denoiser, given = tiny(kind).to(dtype), inputs(kind)
    base = output(denoiser, given)
    add_adapter(denoiser, spec_for(kind, basis=basis), "content")
    assert torch.equal(output(denoiser, given), base)
    loss = run(denoiser, given).float().square().mean()
    loss.backward()
    gradients = {key: p.grad for key, p in trainable_parameters(denoiser, "content").items()}
    reached = [key for key, gradient in gradients.items() if gradient is not None and bool(gradient.any())]
    # Plain LoRA starts with lora_B zero, so its lora_A has no gradient yet. Some layers never reach the output.
    assert len(reached) > len(gradients) * (0.3 if basis == "lora" else 0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_disabled_is_the_base_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    denoiser, given = tiny(kind).to(dtype), inputs(kind)
    base, weights = output(denoiser, given), copy.deepcopy(denoiser.state_dict())
    add_adapter(denoiser, spec_for(kind), "content")
    shake(denoiser, "content")
    adapted = output(denoiser, given)
    assert not torch.equal(adapted, base)
    with adapters_disabled(denoiser):
        assert torch.equal(output(denoiser, given), base)
    assert torch.equal(output(denoiser, given), adapted)
    now = {key.replace(".base_layer", ""): value for key, value in denoiser.state_dict().items()}
    assert all(torch.equal(now[key], value) for key, value in weights.items())
    remove_adapter(denoiser, "content")
    assert torch.equal(output(denoiser, given), base)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("alpha", [None, 9.0])
@pytest.mark.parametrize("kind", ["flux", "unet"])
def test_layers_compute_the_published_formula(kind: str, side: str, alpha: float | None) -> None:
    """`W_res + s Q (R + dR)` in float64, with the adapter's own Q, `R = Q^T W / s` and `W_res = W - s Q R`."""
    denoiser = tiny(kind)
    spec = spec_for(kind, side=side, lora_alpha=alpha, init="normal")
    names = add_adapter(denoiser, spec, "content")
    scale = 1.0 if alpha is None else alpha / 6
    for layer in lora_layers(denoiser).values():
        base = layer.get_base_layer()
        weight = base.weight.double().flatten(1)
        A, B = (getattr(layer, f)["content"].weight.double().flatten(1) for f in ("lora_A", "lora_B"))
        if side == "output":
            R = B.T @ weight / scale
            dense = (weight - scale * B @ R) + scale * B @ (R + A)
        else:
            L = weight @ A.T / scale
            dense = (weight - scale * L @ A) + scale * (L + B) @ A
        expected, x = _apply(base, dense.reshape(base.weight.shape))
        with torch.no_grad():
            got = layer(x).double()
        assert float((got - expected).norm() / expected.norm()) < 1e-6
    assert set(names) == set(lora_layers(denoiser))


def _apply(base: nn.Module, dense: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    bias = base.bias.double() if base.bias is not None else None
    if isinstance(base, nn.Conv2d):
        x = torch.randn(2, base.in_channels, 6, 6, generator=generator)
        return F.conv2d(x.double(), dense, bias, base.stride, base.padding).detach(), x
    x = torch.randn(3, base.in_features, generator=generator)
    return F.linear(x.double(), dense, bias).detach(), x


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_factor_is_orthonormal_and_fp32_whatever_the_base(kind: str, side: str) -> None:
    denoiser = tiny(kind).to(torch.bfloat16)
    add_adapter(denoiser, spec_for(kind, side=side), "content")
    for layer in lora_layers(denoiser).values():
        A, B = layer.lora_A["content"].weight, layer.lora_B["content"].weight
        assert A.dtype == B.dtype == torch.float32
        Q = B.flatten(1) if side == "output" else A.flatten(1).T
        assert float((Q.T @ Q - torch.eye(6)).abs().max()) < 1e-5


def frozen_and_trained(denoiser: nn.Module, name: str = "content") -> tuple[bool, bool]:
    layers = [layer for layer in lora_layers(denoiser).values() if name in layer.lora_A]
    basis = {layer.lora_B[name].weight.requires_grad for layer in layers}
    trained = {layer.lora_A[name].weight.requires_grad for layer in layers}
    assert len(basis) == len(trained) == 1
    return not basis.pop(), trained.pop()


def test_the_basis_stays_frozen_through_everything_peft_does() -> None:
    denoiser: Any = tiny_flux()
    add_adapter(denoiser, spec_for("flux"), "content")
    add_adapter(denoiser, spec_for("flux"), "style")
    assert frozen_and_trained(denoiser, "style") == (True, True)
    denoiser.set_adapter("content")
    assert frozen_and_trained(denoiser) == (True, True)
    assert frozen_and_trained(denoiser, "style") == (True, False)
    set_adapters(denoiser, {"content": 0.9, "style": 1.0})
    assert frozen_and_trained(denoiser) == frozen_and_trained(denoiser, "style") == (True, True)
    with adapters_disabled(denoiser):
        assert frozen_and_trained(denoiser) == (True, False)
    assert frozen_and_trained(denoiser) == (True, True)
    denoiser.disable_adapters()
    denoiser.enable_adapters()
    assert frozen_and_trained(denoiser) == (True, True)
    twin = copy.deepcopy(denoiser)
    twin.set_adapter(["content", "style"])
    assert frozen_and_trained(twin) == (True, True)
    remove_adapter(denoiser, "style")
    assert frozen_and_trained(denoiser) == (True, True)
    assert frozen_and_trained(twin, "style") == (True, True)


def test_only_the_coefficients_are_trainable_and_their_order_is_the_models() -> None:
    denoiser = tiny_flux()
    names = add_adapter(denoiser, spec_for("flux"), "content")
    parameters = trainable_parameters(denoiser, "content")
    assert list(parameters) == [f"{name}.lora_A.weight" for name in names]
    assert {id(p) for p in parameters.values()} == {id(p) for p in denoiser.parameters() if p.requires_grad}
    plain = tiny_flux()
    names = add_adapter(plain, spec_for("flux", basis="lora"), "content")
    assert len(trainable_parameters(plain, "content")) == 2 * len(names)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("init", ["zero", "normal"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", ["flux", "unet"])
def test_masked_entries_stay_zero_through_adamw(kind: str, side: str, init: str, copied: bool) -> None:
    denoiser, given = tiny(kind), inputs(kind)
    add_adapter(denoiser, spec_for(kind, side=side, init=init), "content")
    if copied:
        denoiser = copy.deepcopy(denoiser)
    parameters = trainable_parameters(denoiser, "content")
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
    target = torch.randn(output(denoiser, given).shape, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        if step == 1:  # the mask survives a round of disabling, too
            with adapters_disabled(denoiser):
                pass
        optimizer.zero_grad()
        (run(denoiser, given) - target).square().mean().backward()
        optimizer.step()
    for key, parameter in parameters.items():
        flat = parameter.detach().flatten(1)
        outside = flat.tril(-1) if side == "output" else flat.triu(1)
        assert not outside.any(), key
        if parameter.grad is not None and parameter.grad.any():
            inside = flat.triu() if side == "output" else flat.tril()
            assert inside.count_nonzero() > inside.numel() / 3


def test_full_mask_trains_every_entry() -> None:
    denoiser, given = tiny_flux(), inputs("flux")
    add_adapter(denoiser, spec_for("flux", mask="full"), "content")
    run(denoiser, given).square().mean().backward()
    name = "transformer_blocks.0.attn.to_v.lora_A.weight"
    gradient = trainable_parameters(denoiser, "content")[name].grad
    assert gradient is not None
    assert bool(gradient.tril(-1).any())


def test_starts_depend_on_the_seed_and_the_layer_alone() -> None:
    def start(seed: int, targets: list[str], basis: str = "qr") -> dict[str, Tensor]:
        denoiser = tiny_flux()
        add_adapter(
            denoiser, AdapterSpec(rank=4, init="normal", seed=seed, target_modules=targets, basis=basis), "content"
        )
        return {
            f"{n}.{f}": getattr(m, f)["content"].weight
            for n, m in lora_layers(denoiser).items()
            for f in ("lora_A", "lora_B")
        }

    for basis in ("qr", "random", "lora"):
        few, many, other = start(1, ["attn.to_q"], basis), start(1, FLUX_TARGETS, basis), start(2, ["attn.to_q"], basis)
        assert all(torch.equal(few[key], many[key]) for key in few)
        assert not any(torch.equal(few[key], other[key]) for key in few if basis != "qr" or "lora_A" in key)
        values = [value for key, value in few.items() if "lora_A" in key]
        assert not torch.equal(values[0], values[1])


def test_normal_start_has_its_standard_deviation() -> None:
    denoiser = tiny_flux()
    add_adapter(denoiser, spec_for("flux", init="normal", init_std=0.02, mask="full"), "content")
    values = torch.cat([p.detach().flatten() for p in trainable_parameters(denoiser, "content").values()])
    assert 0.0195 < float(values.std()) < 0.0205


def test_the_global_random_state_and_the_active_adapter() -> None:
    denoiser: Any = tiny_flux()
    state = torch.get_rng_state()
    add_adapter(denoiser, spec_for("flux", init="normal"), "content")
    assert torch.equal(torch.get_rng_state(), state)
    assert denoiser.active_adapters() == ["content"]
    add_adapter(denoiser, spec_for("flux"), "style")
    assert denoiser.active_adapters() == ["style"]


def test_adapters_of_one_base_share_the_values_of_their_basis_but_not_its_storage() -> None:
    denoiser = tiny_flux()
    add_adapter(denoiser, spec_for("flux"), "content")
    add_adapter(denoiser, spec_for("flux"), "style")
    for layer in lora_layers(denoiser).values():
        one, two = layer.lora_B["content"].weight, layer.lora_B["style"].weight
        assert torch.equal(one, two)
        assert one.data_ptr() != two.data_ptr()


def test_progress_counts_layers() -> None:
    seen: list[tuple[int, int]] = []
    names = add_adapter(tiny_flux(), spec_for("flux"), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n + 1, len(names)) for n in range(len(names))]


def test_names_match_whole_components_only() -> None:
    denoiser = tiny("unet")
    names = add_adapter(denoiser, AdapterSpec(rank=4, target_modules=["attn1.to_q", "to_out.0"]), "content")
    assert all(name.endswith((".attn1.to_q", ".attn1.to_out.0", ".attn2.to_out.0")) for name in names)
    expression = r"mid_block\..*attn2\.to_[qk]"
    names = add_adapter(denoiser, AdapterSpec(rank=4, target_modules=expression), "style")
    assert [name.rpartition(".")[2] for name in names] == ["to_q", "to_k"]
    assert not any("lora" in name or "base_layer" in name for name in names)


def test_spec_is_strict_and_plain_lora_has_no_mask() -> None:
    assert AdapterSpec(basis="lora", mask="upper").mask == "full"
    assert AdapterSpec().scale == 1.0
    assert AdapterSpec(rank=4, lora_alpha=8).scale == 2.0
    for bad in ({"rnak": 4}, {"rank": 0}, {"lora_alpha": float("nan")}, {"side": "left"}, {"init_std": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdapterSpec(**bad)  # pyright: ignore[reportArgumentType]
