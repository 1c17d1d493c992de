"""The forms against their papers' formulas in float64, and back from their files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qrlora.adapter import (
    AdapterSpec,
    adapter_of,
    add_adapter,
    attach_adapter,
    kept_tensors,
    ranks_of,
    remove_adapter,
    restore_kept,
    set_adapters,
    trainable_parameters,
    trained_size,
)
from qrlora.basis import Side
from qrlora.formats import Adapter, LowRank, SaveDtype, read_adapter
from qrlora.merging import merge
from tests.adapter_forms import FEW, FORMS, apply, lora_layers, shake, some_input, spec_for, with_form
from tests.adapters_of_data import dense, relative
from tests.tiny_models import inputs, output, run, tiny_flux


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """lora_B and lora_A as matrices in float64."""
    return tuple(getattr(layer, f)["content"].weight.detach().double().flatten(1) for f in ("lora_B", "lora_A"))  # pyright: ignore[reportReturnType]


def expected_weight(name: str, layer: Any, start: tuple[Tensor, Tensor]) -> Tensor:
    """`W'` as a matrix, by the paper's formula; `start` are the factors before anything was trained."""
    W = layer.get_base_layer().weight.detach().double().flatten(1)
    B, A = factors(layer)
    scale = 6.0 / 4 if "lora_alpha" in FORMS[name] else 1.0
    if name.startswith("core"):
        core = layer.lora_own["content"].core.detach().double()
        return W + scale * B @ core @ A
    if name == "dora":
        magnitude = layer.lora_own["content"].lora_magnitude_vector.detach().double().reshape(-1, 1)
        moved = W + scale * B @ A
        return magnitude * moved / moved.norm(dim=1, keepdim=True)
    return W + scale * (B @ A - start[0] @ start[1])


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("name", FORMS)
def test_layers_compute_the_papers_formula_and_so_does_the_file(name: str, kind: str, tmp_path: Path) -> None:
    denoiser = with_form(name, kind)
    starts = {path: factors(layer) for path, layer in lora_layers(denoiser).items()}
    shake(denoiser)
    set_adapters(denoiser, {"content": 1.0})
    adapter = read_adapter(adapter_of(denoiser, "content").save(tmp_path / "a.safetensors"))
    for path, layer in lora_layers(denoiser).items():
        base = layer.get_base_layer()
        x, expected = some_input(base), expected_weight(name, layer, starts[path])
        with torch.no_grad():
            got = layer(x)
        assert relative(got, apply(base, expected, x)) < 1e-6
        if name != "dora":
            change = expected - base.weight.detach().double().flatten(1)
            assert relative(dense(adapter, path), change) < 1e-5


def test_both_starts_from_the_basis_and_its_projection() -> None:
    qr, both = tiny_flux(), with_form("both")
    add_adapter(qr, AdapterSpec(rank=4, target_modules=FEW["flux"]), "content")
    for mine, theirs in zip(lora_layers(both).values(), lora_layers(qr).values(), strict=True):
        Q, R = factors(mine)
        assert torch.equal(Q, factors(theirs)[0])
        W = mine.get_base_layer().weight.detach().double()
        assert relative(R, Q.T @ W) < 1e-6
        assert float(R[:, :4].tril(-1).abs().max()) < 1e-5
    assert len(trainable_parameters(both, "content")) == 2 * len(lora_layers(both))


def test_pissa_and_olora_start_where_peft_does() -> None:
    for name in ("pissa", "olora"):
        for layer in lora_layers(with_form(name)).values():
            W = layer.get_base_layer().weight.detach().double()
            B, A = factors(layer)
            scale = 6.0 / 4 if name == "pissa" else 1.0
            if name == "pissa":
                U, S, V = torch.linalg.svd(W)
                expected = U[:, :4] @ torch.diag(S[:4]) @ V[:4]
                assert relative(B.norm(dim=0), (S[:4] / scale).sqrt()) < 1e-5
                assert relative(A.norm(dim=1), (S[:4] / scale).sqrt()) < 1e-5
            else:
                Q, R = torch.linalg.qr(W)
                expected = Q[:, :4] @ R[:4]
            assert relative(scale * B @ A, expected) < 1e-5


def test_a_core_is_between_frozen_singular_vectors() -> None:
    denoiser = with_form("core")
    for layer in lora_layers(denoiser).values():
        U, S, V = torch.linalg.svd(layer.get_base_layer().weight.detach().double())
        B, A = factors(layer)
        assert relative(B @ A, U[:, :4] @ torch.diag(S[:4]) @ V[:4]) < 1e-5
    parameters = trainable_parameters(denoiser, "content")
    assert {tuple(parameter.shape) for parameter in parameters.values()} == {(4, 4)}
    assert all(key.endswith(".core") for key in parameters)
    trained = [key for key, parameter in denoiser.named_parameters() if parameter.requires_grad and "lora" in key]
    assert len(trained) == len(parameters)
    denoiser.set_adapter("content")  # which activates every parameter it knows
    assert len(trained) == sum(p.requires_grad for key, p in denoiser.named_parameters() if "lora" in key)
    assert trained_size(adapter_of(denoiser, "content")) == 16 * len(parameters)


def test_cores_of_one_base_merge_at_their_rank() -> None:
    parts: list[Adapter] = []
    for _ in range(2):
        denoiser = with_form("core")
        shake(denoiser, seed=len(parts))
        parts.append(adapter_of(denoiser, "content"))
    merged = merge(parts, [1.0, 2.0])
    for layer, pair in merged.layers.items():
        assert pair.rank == 4
        assert relative(dense(merged, layer), dense(parts[0], layer) + 2 * dense(parts[1], layer)) < 1e-5


@pytest.mark.parametrize("name", FORMS)
def test_training_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    denoiser = with_form(name)
    shake(denoiser)
    expected = output(denoiser, inputs("flux"))
    adapter = read_adapter(adapter_of(denoiser, "content").save(tmp_path / "a.safetensors"))
    assert ranks_of(adapter) == {4}
    parameters = trainable_parameters(denoiser, "content")
    assert trained_size(adapter) == sum(parameter.numel() for parameter in parameters.values())
    again = tiny_flux()
    attach_adapter(again, adapter, "content", trainable=True, spec=spec_for(name))
    assert relative(output(again, inputs("flux")), expected) < 1e-5
    mine = trainable_parameters(again, "content")
    assert list(mine) == list(parameters)
    for key, parameter in mine.items():
        assert relative(parameter.detach(), parameters[key].detach()) < 1e-5
    # What a checkpoint keeps besides makes it exact.
    restore_kept(again, "content", {key: tensor.clone() for key, tensor in kept_tensors(denoiser, "content").items()})
    for key, parameter in mine.items():
        parameter.data.copy_(parameters[key].detach())
    assert torch.equal(output(again, inputs("flux")), expected)
    run(again, inputs("flux")).square().mean().backward()
    assert all(parameter.grad is not None for parameter in mine.values())


@pytest.mark.parametrize("name", FORMS)
def test_attached_without_training_it_is_frozen_and_comes_off_as_it_was(name: str) -> None:
    denoiser = with_form(name)
    shake(denoiser)
    adapter = adapter_of(denoiser, "content")
    other: Any = tiny_flux()
    base = output(other, inputs("flux"))
    attach_adapter(other, adapter, "content")
    assert relative(output(other, inputs("flux")), output(denoiser, inputs("flux"))) < 1e-5
    other.set_adapter("content")
    assert trainable_parameters(other, "content") == {}
    assert not any(parameter.requires_grad for key, parameter in other.named_parameters() if "lora" in key)
    back = adapter_of(other, "content")
    assert back.header == adapter.header
    assert all(torch.equal(back.layers[layer].B, pair.B) for layer, pair in adapter.layers.items())
    assert {layer: set(own) for layer, own in back.own.items()} == {
        layer: set(own) for layer, own in adapter.own.items()
    }
    remove_adapter(other, "content")
    assert torch.equal(output(other, inputs("flux")), base)
    assert not [key for key in other.state_dict() if "content" in key]


@pytest.mark.parametrize("name", ["both", "core", "dora"])
def test_two_adapters_side_by_side(name: str) -> None:
    """Each with its own tensors and weight; removing one leaves the other."""
    denoiser = with_form(name)
    shake(denoiser)
    alone = output(denoiser, inputs("flux"))
    add_adapter(denoiser, AdapterSpec(rank=4, target_modules=FEW["flux"]), "style")
    set_adapters(denoiser, {"content": 1.0, "style": 1.0})
    assert torch.equal(output(denoiser, inputs("flux")), alone)  # style starts at zero
    remove_adapter(denoiser, "style")
    assert torch.equal(output(denoiser, inputs("flux")), alone)


@pytest.mark.parametrize("name", ["both", "core"])
def test_fused_and_unfused(name: str) -> None:
    denoiser = with_form(name)
    base_weights = {path: layer.get_base_layer().weight.clone() for path, layer in lora_layers(denoiser).items()}
    shake(denoiser)
    expected = output(denoiser, inputs("flux"))
    denoiser.fuse_lora()
    assert relative(output(denoiser, inputs("flux")), expected) < 1e-5
    denoiser.unfuse_lora()
    for path, layer in lora_layers(denoiser).items():
        assert relative(layer.get_base_layer().weight, base_weights[path]) < 1e-6


def test_the_input_side_keeps_only_coefficients_for_the_backward_pass() -> None:
    """With lora_A frozen, autograd has no use for the layer's input: T x r numbers instead of T x in."""
    kept: dict[str, int] = {}
    for side in ("output", "input"):
        denoiser = tiny_flux()
        add_adapter(denoiser, AdapterSpec(rank=4, side=side, target_modules=["ff.net.2"]), "content")  # pyright: ignore[reportArgumentType]
        layer: Any = lora_layers(denoiser)["transformer_blocks.0.ff.net.2"]
        x = torch.randn(50, layer.in_features, requires_grad=True)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel() if tensor.shape[0] == 50 else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x).sum().backward()
        kept[side] = sum(sizes)
    assert kept == {"output": 50 * 128, "input": 50 * 4}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_a_core_goes_on_from_the_update_of_its_file(side: Side, dtype: SaveDtype, tmp_path: Path) -> None:
    """Also of a file whose frozen factor has other signs than the one computed here."""
    denoiser = with_form("core", side=side)
    shake(denoiser)
    read = read_adapter(adapter_of(denoiser, "content").save(tmp_path / "core.safetensors", save_dtype=dtype))
    for sign in (1, -1):
        signed = {name: LowRank(sign * pair.B, pair.A) for name, pair in read.layers.items()}
        adapter = Adapter(signed, read.header, source="core")
        other = tiny_flux()
        attach_adapter(other, adapter, "content", trainable=True, spec=spec_for("core", side=side))
        again = adapter_of(other, "content")
        for layer in adapter.layers:
            assert relative(dense(again, layer), dense(adapter, layer)) < (1e-5 if dtype == "fp32" else 1e-2)
