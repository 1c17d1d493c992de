"""Gated (Freq-MoE) adapters against the dense formula, token by token, in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from qrlora.adapter import (
    AdapterSpec,
    adapter_of,
    adapters_disabled,
    add_adapter,
    attach_adapter,
    record_usage,
    remove_adapter,
    save_adapter,
    set_adapters,
    trainable_parameters,
)
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, read_adapter, write_adapter
from qrlora.merging import merge
from tests.adapter.test_add_adapter import lora_layers
from tests.tiny_models import inputs, output, run, tiny, tiny_unet
from tests.tiny_pipelines import flux_pipeline

KINDS = ("flux", "sd3")


FEW = {"flux": ["attn.to_q", "attn.to_v", "ff.net.2"], "sd3": ["attn.to_q", "attn.to_out.0"], "unet": ["conv1"]}


def spec(kind: str = "flux", **fields: Any) -> AdapterSpec:
    return AdapterSpec(**({"rank": 8, "experts": 4, "target_modules": FEW[kind]} | fields))


def shake(denoiser: Any, name: str, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in trainable_parameters(denoiser, name).items():
        size = 0.05 if "lora_A" in key else 1.0
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)


def gated(kind: str = "flux", seed: int = 3, **fields: Any) -> Any:
    denoiser = tiny(kind)
    add_adapter(denoiser, spec(kind, **fields), "content")
    shake(denoiser, "content", seed)
    return denoiser


def update_of(adapter: Adapter, layer: str, x: Tensor) -> Tensor:
    """`Q (expand(g(x)) * dR x)` for one token `x [in]`, written out expert by expert."""
    pair, own = adapter.layers[layer], adapter.own[layer]
    Q, dR = pair.B.double(), pair.A.double()
    logits = own["gate_weight"].double() @ x + own["gate_bias"].double()
    shares = torch.exp(logits - logits.max())
    shares = shares / shares.sum()
    if "top_k" in own:
        kept = sorted(range(len(shares)), key=lambda index: -float(shares[index]))[: len(own["top_k"])]
        total = sum(float(shares[index]) for index in kept)
        shares = torch.tensor([float(shares[i]) / total if i in kept else 0.0 for i in range(len(shares))]).double()
    width = pair.rank // len(shares)
    parts = [slice(index * width, (index + 1) * width) for index in range(len(shares))]
    return sum(
        (share * (Q[:, part] @ (dR[part] @ x)) for share, part in zip(shares, parts, strict=True)), torch.zeros(())
    )


@pytest.mark.parametrize("fields", [{}, {"top_k": 2}, {"experts": 8, "lora_alpha": 4.0, "top_k": 3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_gets_the_dense_formula(kind: str, fields: dict[str, Any]) -> None:
    denoiser = gated(kind, **fields)
    set_adapters(denoiser, {"content": 0.7})
    adapter = adapter_of(denoiser, "content")  # its scale is baked in
    generator = torch.Generator().manual_seed(0)
    for name, layer in lora_layers(denoiser).items():
        base = layer.get_base_layer()
        x = torch.randn(2, 3, base.in_features, generator=generator)
        with torch.no_grad():
            got = layer(x).double()
        weight, bias = base.weight.double(), base.bias.double()
        for row in range(2):
            for token in range(3):
                given = x[row, token].double()
                expected = weight @ given + bias + 0.7 * update_of(adapter, name, given)
                assert float((got[row, token] - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("basis", ["qr", "svd"])
def test_each_expert_is_the_qr_of_its_spectral_band(basis: str) -> None:
    denoiser = tiny("flux")
    for name in add_adapter(denoiser, spec(basis=basis), "content"):
        layer: Any = denoiser.get_submodule(name)
        weight, Q = layer.get_base_layer().weight.detach().double(), layer.lora_B["content"].weight.detach().double()
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(Q.T @ Q, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)
        for index in range(4):
            part = slice(2 * index, 2 * index + 2)
            band = (U[:, part] * S[part]) @ Vh[part]
            if basis == "qr":
                expected, R = torch.linalg.qr(band)
                expected = expected[:, :2] * torch.sign(torch.diagonal(R)[:2])
            else:
                peaks = U[:, part].gather(0, U[:, part].abs().argmax(0, keepdim=True))
                expected = U[:, part] * torch.sign(peaks)
            torch.testing.assert_close(Q[:, part], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_exactly_the_base_and_disabling_gives_it_back(kind: str, dtype: torch.dtype) -> None:
    denoiser, given = tiny(kind).to(dtype), inputs(kind)
    base = output(denoiser, given)
    add_adapter(denoiser, spec(kind, top_k=2), "content")
    assert torch.equal(output(denoiser, given), base)
    shake(denoiser, "content")
    adapted = output(denoiser, given)
    assert not torch.equal(adapted, base)
    with adapters_disabled(denoiser):
        assert torch.equal(output(denoiser, given), base)
    assert torch.equal(output(copy.deepcopy(denoiser), given), adapted)
    remove_adapter(denoiser, "content")
    assert torch.equal(output(denoiser, given), base)
    assert not any("lora" in key for key, _ in denoiser.named_parameters())


def test_gate_and_coefficients_are_trained_and_nothing_else() -> None:
    denoiser, given = tiny("flux"), inputs("flux")
    base = output(denoiser, given)
    layers = add_adapter(denoiser, spec(top_k=2), "content")
    parameters = trainable_parameters(denoiser, "content")
    keys = ("lora_A.weight", "gate_bias", "gate_weight")
    assert list(parameters) == [f"{layer}.{key}" for layer in layers for key in keys]
    assert {id(p) for p in parameters.values()} == {id(p) for p in denoiser.parameters() if p.requires_grad}
    before = {key: value.detach().clone() for key, value in parameters.items()}
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2)
    target, losses = torch.randn(base.shape, generator=torch.Generator().manual_seed(0)), []
    for _ in range(4):
        optimiser.zero_grad()
        loss = (run(denoiser, given) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for key in keys:
        name = f"transformer_blocks.0.attn.to_v.{key}"
        assert not torch.equal(parameters[name], before[name])


def test_two_gated_adapters_are_summed_each_with_its_own_gate_and_scale() -> None:
    denoiser = gated(seed=3)
    content = adapter_of(denoiser, "content")
    add_adapter(denoiser, spec(experts=8, top_k=3, seed=1), "style")
    shake(denoiser, "style", 4)
    style = adapter_of(denoiser, "style")
    set_adapters(denoiser, {"content": 0.9, "style": 0.4})
    for name, layer in lora_layers(denoiser).items():
        base = layer.get_base_layer()
        x = torch.randn(base.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            got = layer(x[None])[0].double()
        given = x.double()
        expected = base.weight.double() @ given + base.bias.double()
        expected = expected + 0.9 * update_of(content, name, given) + 0.4 * update_of(style, name, given)
        assert float((got - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("fields", [{}, {"top_k": 2, "lora_alpha": 3.0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_same_pictures_and_trains_further(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    denoiser, given = gated(kind, **fields), inputs(kind)
    path = save_adapter(denoiser, "content", tmp_path / "gated.safetensors", base_model="tiny", trigger_words=["<c>"])
    read = read_adapter(path)
    assert read.header is not None
    assert (read.header.form, read.header.basis, read.header.side) == ("gated", "qr", "output")
    assert read.header.trigger_words == ["<c>"]
    other = tiny(kind)
    attach_adapter(other, read, "content", weight=0.5)
    set_adapters(denoiser, {"content": 0.5})
    torch.testing.assert_close(output(other, given), output(denoiser, given))
    assert trainable_parameters(other, "content") == {}
    back = adapter_of(other, "content")
    for layer, own in read.own.items():
        assert all(torch.equal(back.own[layer][key], tensor) for key, tensor in own.items())
    further = tiny(kind)
    attach_adapter(further, read, "content", trainable=True, spec=spec(kind, **fields))
    set_adapters(further, {"content": 0.5})
    torch.testing.assert_close(output(further, given), output(denoiser, given))
    mine, theirs = trainable_parameters(further, "content"), trainable_parameters(denoiser, "content")
    assert list(mine) == list(theirs)
    assert all(torch.allclose(mine[key], theirs[key], rtol=1e-6, atol=0) for key in mine)


def test_no_stock_loader_takes_a_part_for_the_whole(tmp_path: Path) -> None:
    pipeline: Any = flux_pipeline()
    add_adapter(pipeline.transformer, spec(target_modules=["attn.to_q"]), "content")
    path = save_adapter(pipeline.transformer, "content", tmp_path / "gated.safetensors")
    fresh: FluxPipeline = flux_pipeline()
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        fresh.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert not getattr(fresh.transformer, "peft_config", None)


def test_merging_fusing_and_exporting_are_refused_with_the_reason(tmp_path: Path) -> None:
    denoiser = gated()
    adapter = adapter_of(denoiser, "content")
    reason = "is a gated adapter and cannot be .*, since its update differs from token to token"
    for method in ("auto", "sum", "concat"):
        with pytest.raises(QrloraError, match=reason):
            merge([adapter, adapter], method=method)
    for format in ("diffusers", "peft", "kohya"):
        with pytest.raises(QrloraError, match=reason):
            write_adapter(adapter, tmp_path / "other.safetensors", format)
    with pytest.raises(QrloraError, match=reason):
        adapter.save(tmp_path / "small.safetensors", coefficients_only=True)
    with pytest.raises(QrloraError, match=r"gated adapter, .* cannot be fused"):
        denoiser.fuse_lora()
    assert list(tmp_path.iterdir()) == []


def test_usage_is_the_mean_over_tokens_and_steps() -> None:
    denoiser, given = gated(), inputs("flux")
    seen: dict[str, list[Tensor]] = {}
    layers = lora_layers(denoiser)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0].detach()))
    with record_usage(denoiser, "content") as usage:
        output(denoiser, given)
        output(denoiser, inputs("flux", seed=5))
        with adapters_disabled(denoiser):
            output(denoiser, given)  # not counted
    output(denoiser, given)
    adapter = adapter_of(denoiser, "content")
    assert usage.layers == [name for name in layers if name in seen]
    for name, row, entropy in zip(usage.layers, usage.weights, usage.entropies, strict=True):
        own = adapter.own[name]
        x = torch.cat([x.flatten(0, -2) for x in seen[name][:2]]).double()
        shares = torch.softmax(x @ own["gate_weight"].double().T + own["gate_bias"].double(), dim=-1)
        assert usage.tokens[name] == len(x)
        torch.testing.assert_close(torch.tensor(row).double(), shares.mean(0), rtol=1e-4, atol=1e-5)
        assert entropy == pytest.approx(float(-(shares * shares.log()).sum(-1).mean()), rel=1e-3, abs=1e-5)


def test_usage_is_read_by_the_analyses(tmp_path: Path) -> None:
    from qrlora.analysis import ExpertUsage

    denoiser = gated(top_k=1)
    with record_usage(denoiser, "content") as usage:
        with pytest.raises(QrloraError, match="no token has passed"):
            usage.save(tmp_path / "usage.json")
        output(denoiser, inputs("flux"))
    assert usage.entropies == [0.0] * len(usage.layers)
    read = ExpertUsage.read(usage.save(tmp_path / "usage.json"))
    assert (read.name, read.layers) == ("content", usage.layers)
    torch.testing.assert_close(read.matrix(), torch.tensor(usage.weights).double(), rtol=0, atol=1e-6)
    add_adapter(denoiser, spec(experts=None, form="auto"), "plain")
    with pytest.raises(QrloraError, match="'plain' has no gates"), record_usage(denoiser, "plain"):
        pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 6}, "experts=4 does not divide the rank 6"),
        ({"top_k": 5}, "top_k=5 exceeds experts=4"),
        ({"experts": None, "form": "gated"}, "needs the number of experts"),
        ({"side": "input"}, "side output and no band"),
        ({"basis": "random"}, "basis qr or svd"),
        ({"form": "coefficients"}, "experts=4 belongs to form='gated'"),
        ({"experts": None, "top_k": 2, "form": "coefficients"}, "top_k=2 belongs to form='gated'"),
        ({"rank": 64}, "allows a rank of at most 32"),
    ],
    ids=str,
)
def test_bad_specs_are_refused_in_one_sentence(fields: dict[str, Any], message: str) -> None:
    denoiser = tiny("flux")
    with pytest.raises(QrloraError, match=message):
        add_adapter(denoiser, spec(**fields), "content")
    assert lora_layers(denoiser) == {}


def test_a_convolution_has_no_tokens() -> None:
    with pytest.raises(QrloraError, match="is a convolution, which has no tokens"):
        add_adapter(tiny_unet(), spec("unet", rank=4), "content")


@pytest.mark.parametrize("damage", ["gate_weight", "gate_bias", "top_k", "extra", "missing"])
def test_a_damaged_gate_is_refused_by_its_layer(damage: str) -> None:
    adapter = adapter_of(gated(top_k=2), "content")
    layer = next(iter(adapter.own))
    own: Any = adapter.own[layer]
    if damage == "missing":
        del own["gate_bias"]
    elif damage == "extra":
        own["more"] = torch.ones(1)
    else:
        own[damage] = torch.cat([own[damage]] * 3)
    denoiser = tiny("flux")
    with pytest.raises(QrloraError, match=rf"{layer}: .* is no gated adapter"):
        attach_adapter(denoiser, adapter, "content")
    assert lora_layers(denoiser) == {}
    whole = adapter_of(gated(top_k=2), "content")
    with pytest.raises(QrloraError, match="has experts=4 and top_k=2, but experts=2 and top_k=None are asked for"):
        attach_adapter(denoiser, whole, "content", trainable=True, spec=spec(experts=2))
