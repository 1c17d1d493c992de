"""Adapters from files on denoisers: the right base, trained further, coefficients alone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from qrlora.adapter import (
    AdapterSpec,
    BasisCache,
    adapter_of,
    add_adapter,
    attach_adapter,
    base_hash,
    remove_adapter,
    resolve_coefficients,
    save_adapter,
    set_adapters,
    trainable_parameters,
)
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, LowRank, read_adapter, read_coefficients
from tests.adapter.test_add_adapter import KINDS, frozen_and_trained, lora_layers, shake, spec_for
from tests.adapter.test_stock_loaders import close
from tests.tiny_models import inputs, output, run, tiny, tiny_flux, tiny_sd3


def trained(kind: str = "flux", **fields: Any) -> tuple[Any, Adapter]:
    denoiser = tiny(kind)
    add_adapter(denoiser, spec_for(kind, **fields), "content")
    shake(denoiser, "content")
    return denoiser, adapter_of(denoiser, "content", base_model="tiny", trigger_words=["<c>"], training={"steps": 3})


@pytest.mark.parametrize(
    "fields", [{}, {"side": "input", "mask": "full"}, {"basis": "lora", "lora_alpha": 3.0}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_attaches_to_the_same_output(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    denoiser, adapter = trained(kind, **fields)
    read = read_adapter(adapter.save(tmp_path / "a.safetensors"))
    assert read.header == adapter.header
    other = tiny(kind)
    base = output(other, inputs(kind))
    assert attach_adapter(other, read, "content", weight=0.5) == list(lora_layers(other))
    set_adapters(denoiser, {"content": 0.5})
    assert close(output(other, inputs(kind)), output(denoiser, inputs(kind)))
    assert trainable_parameters(other, "content") == {}
    assert not any(parameter.requires_grad for name, parameter in other.named_parameters() if "lora" in name)
    # Read, attached and copied off again, it is the same adapter, header and all.
    back = adapter_of(other, "content")
    assert back.header == read.header
    assert all(torch.equal(back.layers[layer].delta(), pair.delta()) for layer, pair in read.layers.items())
    remove_adapter(other, "content")
    assert torch.equal(output(other, inputs(kind)), base)


def test_the_header_tells_what_made_it() -> None:
    denoiser, adapter = trained(lora_alpha=3.0, seed=5)
    header = adapter.header
    assert header is not None
    assert (header.basis, header.side, header.mask, header.rank, header.lora_alpha, header.seed) == (
        "qr",
        "output",
        "upper",
        6,
        3.0,
        5,
    )
    assert (header.base_model, header.trigger_words, header.training) == ("tiny", ["<c>"], {"steps": 3})
    assert header.base_hash == base_hash(tiny_flux(), adapter.layers) != base_hash(tiny_flux(1), adapter.layers)
    assert set(header.weight_hashes) == set(adapter.layers)
    add_adapter(denoiser, spec_for("flux"), "style")
    style = adapter_of(denoiser, "style").header
    assert style is not None
    assert style.fingerprint == header.fingerprint
    other = tiny_flux(1)
    add_adapter(other, spec_for("flux"), "style")
    another = adapter_of(other, "style").header
    assert another is not None
    assert another.fingerprint != header.fingerprint
    with pytest.raises(QrloraError, match="has no layer nothing"):
        base_hash(denoiser, ["nothing"])


def test_the_weight_of_set_adapters_is_no_part_of_the_file() -> None:
    denoiser, adapter = trained()
    set_adapters(denoiser, {"content": 0.25})
    again = adapter_of(denoiser, "content")
    assert all(torch.equal(again.layers[layer].A, pair.A) for layer, pair in adapter.layers.items())


@pytest.mark.parametrize("fields", [{}, {"side": "input"}, {"mask": "full", "lora_alpha": 12.0}], ids=str)
def test_reloading_for_training_freezes_and_masks_again(fields: dict[str, Any]) -> None:
    denoiser, adapter = trained(**fields)
    other: Any = tiny_flux()
    attach_adapter(other, adapter, "content", trainable=True, spec=spec_for("flux", **fields))
    other.set_adapter("content")
    side = fields.get("side", "output")
    assert frozen_and_trained(other) == ((True, True) if side == "output" else (False, False))
    assert close(output(other, inputs("flux")), output(denoiser, inputs("flux")))
    mine, theirs = trainable_parameters(other, "content"), trainable_parameters(denoiser, "content")
    assert list(mine) == list(theirs)
    assert all(torch.allclose(mine[key], theirs[key], rtol=1e-6, atol=0) for key in mine)
    run(other, inputs("flux")).square().mean().backward()
    run(denoiser, inputs("flux")).square().mean().backward()
    for key, parameter in mine.items():
        expected = theirs[key].grad
        assert parameter.grad is not None
        assert expected is not None
        assert torch.allclose(parameter.grad, expected, rtol=1e-3, atol=1e-7)
        if fields.get("mask") != "full":
            flat = parameter.grad.flatten(1)
            assert not (flat.tril(-1) if side == "output" else flat.triu(1)).any()


def test_stock_loading_then_saving_keeps_the_values(tmp_path: Path) -> None:
    _, adapter = trained()
    stock: Any = tiny_flux()
    stock.load_lora_adapter(str(adapter.save(tmp_path / "a.safetensors")), prefix="transformer", adapter_name="content")
    back = adapter_of(stock, "content")
    assert back.header is not None
    assert back.header.basis is None
    assert all(torch.equal(back.layers[layer].delta(), pair.delta()) for layer, pair in adapter.layers.items())


def test_an_attached_adapter_joins_those_that_are_active() -> None:
    denoiser, adapter = trained()
    set_adapters(denoiser, {"content": 0.5})
    attach_adapter(denoiser, adapter, "style", weight=0.25)
    assert denoiser.active_adapters() == ["content", "style"]
    assert {(layer.scaling["content"], layer.scaling["style"]) for layer in lora_layers(denoiser).values()} == {
        (0.5, 0.25)
    }
    assert frozen_and_trained(denoiser) == (True, True)
    remove_adapter(denoiser, "content")
    assert denoiser.active_adapters() == ["style"]


def test_a_lost_mask_is_noticed_on_saving() -> None:
    denoiser, _ = trained()
    trainable_parameters(denoiser, "content")["transformer_blocks.1.attn.to_q.lora_A.weight"].data += 1
    with pytest.raises(QrloraError, match=r"transformer_blocks\.1\.attn\.to_q has values outside the upper triangle"):
        adapter_of(denoiser, "content")


class TestAnotherBase:
    def test_other_weights_layers_and_shapes_are_refused_by_layer(self) -> None:
        _, adapter = trained()
        other = tiny_flux(1)
        with pytest.raises(
            QrloraError, match=r"another base model: the weight of transformer_blocks\.0\.attn\.to_q differs"
        ):
            attach_adapter(other, adapter, "content")
        assert lora_layers(other) == {}
        with pytest.raises(
            QrloraError, match=r"adapts transformer_blocks\.0\.attn\.to_q as a weight of shape \[32, 32\]"
        ):
            attach_adapter(tiny_flux(width=48), adapter, "content")
        with pytest.raises(QrloraError, match="SD3Transformer2DModel does not have"):
            attach_adapter(tiny_sd3(), adapter, "content")
        with pytest.raises(QrloraError, match="UNet2DConditionModel is a unet"):
            attach_adapter(tiny("unet"), adapter, "content")

    def test_one_changed_layer_is_found(self) -> None:
        _, adapter = trained()
        other: Any = tiny_flux()
        other.transformer_blocks[1].attn.to_v.weight.data[3, 4] += 1e-3
        with pytest.raises(QrloraError, match=r"the weight of transformer_blocks\.1\.attn\.to_v differs"):
            attach_adapter(other, adapter, "content")

    def test_precisions(self) -> None:
        half = tiny_flux().to(torch.bfloat16)
        add_adapter(half, spec_for("flux"), "content")
        adapter = adapter_of(half, "content")
        rounded = tiny_flux().to(torch.bfloat16).to(torch.float32)
        attach_adapter(rounded, adapter, "content")
        attach_adapter(tiny_flux(), adapter, "content")  # rounds to the same bf16 weights
        with pytest.raises(QrloraError, match="another base model"):
            attach_adapter(tiny_flux(1), adapter, "content")
        _, full = trained()
        with pytest.warns(QrloraWarning, match="20 of 20 base weights are loaded in another precision"):
            attach_adapter(half, full, "style")

    def test_without_a_header_shapes_alone_decide(self) -> None:
        _, adapter = trained()
        other = tiny_flux(1)
        attach_adapter(other, dataclasses.replace(adapter, header=None), "content", trainable=True)
        assert len(trainable_parameters(other, "content")) == 2 * len(adapter.layers)


class TestSpecs:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"basis": "svd"}, "basis 'qr' on side output, but 'svd'"),
            ({"side": "input"}, "on side input is asked for"),
            ({"rank": 5}, "has rank 6 at .*rank 5 is asked for"),
        ],
    )
    def test_contradictions(self, fields: dict[str, Any], message: str) -> None:
        _, adapter = trained()
        other = tiny_flux()
        with pytest.raises(QrloraError, match=message):
            attach_adapter(other, adapter, "content", trainable=True, spec=spec_for("flux", **fields))
        assert lora_layers(other) == {}

    def test_a_masked_adapter_may_go_on_without_its_mask(self) -> None:
        _, adapter = trained()
        other = tiny_flux()
        attach_adapter(other, adapter, "content", trainable=True, spec=spec_for("flux", mask="full"))
        for parameter in trainable_parameters(other, "content").values():
            parameter.data += 0.1
        header = adapter_of(other, "content").header
        assert header is not None
        assert header.mask == "full"

    def test_a_weight_that_is_no_number(self) -> None:
        _, adapter = trained()
        with pytest.raises(QrloraError, match="not a finite number"):
            attach_adapter(tiny_flux(), adapter, "content", weight=float("nan"))

    def test_a_full_adapter_cannot_be_trained_masked(self) -> None:
        denoiser, _ = trained(mask="full")
        for parameter in trainable_parameters(denoiser, "content").values():
            parameter.data += 0.1
        adapter = adapter_of(denoiser, "content")
        with pytest.raises(QrloraError, match="outside the upper triangle"):
            attach_adapter(tiny_flux(), adapter, "content", trainable=True, spec=spec_for("flux"))


class TestCoefficients:
    @pytest.mark.parametrize("fields", [{}, {"side": "input", "basis": "svd"}, {"basis": "random", "seed": 4}], ids=str)
    @pytest.mark.parametrize("kind", ["flux", "unet"])
    def test_the_basis_is_found_again(self, kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
        denoiser, adapter = trained(kind, **fields)
        path = save_adapter(denoiser, "content", tmp_path / "small.safetensors", coefficients_only=True)
        BasisCache.forget()
        resolved = resolve_coefficients(read_coefficients(path), tiny(kind), cache=BasisCache(tmp_path / "cache"))
        for layer, pair in adapter.layers.items():
            difference = resolved.layers[layer].delta() - pair.delta()
            assert float(difference.norm() / pair.delta().norm()) < 1e-5
        other = tiny(kind)
        attach_adapter(other, resolved, "content")
        assert close(output(other, inputs(kind)), output(denoiser, inputs(kind)))

    def test_refused_on_another_base(self, tmp_path: Path) -> None:
        denoiser, _ = trained()
        file = read_coefficients(save_adapter(denoiser, "content", tmp_path / "s.safetensors", coefficients_only=True))
        with pytest.raises(QrloraError, match="another base model"):
            resolve_coefficients(file, tiny_flux(1))
        unhashed = dataclasses.replace(file, header=file.header.model_copy(update={"weight_hashes": {}}))
        with pytest.raises(QrloraError, match=r"basis of \S*attn\.to_\w cannot be found again .*misfit"):
            resolve_coefficients(unhashed, tiny_flux(1))
        with pytest.raises(QrloraError, match="does not have"):
            resolve_coefficients(file, tiny_sd3())

    def test_the_two_kinds_of_file_are_told_apart(self, tmp_path: Path) -> None:
        denoiser, adapter = trained()
        small = save_adapter(denoiser, "content", tmp_path / "s.safetensors", coefficients_only=True)
        whole = save_adapter(denoiser, "content", tmp_path / "w.safetensors")
        assert small.stat().st_size < whole.stat().st_size
        with pytest.raises(QrloraError, match="resolve_coefficients"):
            read_adapter(small)
        with pytest.raises(QrloraError, match="not a coefficients-only file"):
            read_coefficients(whole)
        plain = Adapter({"x.y": LowRank(torch.ones(4, 2), torch.ones(2, 4))}, None)
        with pytest.raises(QrloraError, match="save it whole"):
            plain.save(tmp_path / "p.safetensors", coefficients_only=True)
        assert not (tmp_path / "p.safetensors").exists()
        spec = AdapterSpec(rank=4, basis="lora", target_modules=["attn.to_q"])
        add_adapter(denoiser, spec, "style")
        with pytest.raises(QrloraError, match="save it whole"):
            save_adapter(denoiser, "style", tmp_path / "p.safetensors", coefficients_only=True)
        assert adapter.header is not None
