"""Many adapters at once: each picture of a batch is the one that its adapters make alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qrlora.adapter import (
    AdapterBank,
    AdapterSpec,
    adaptable_layers,
    adapter_of,
    add_adapter,
    attach_adapter,
    remove_adapter,
    set_adapters,
)
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, Header, LowRank
from tests.tiny_models import (
    FLUX_TARGETS,
    SD3_TARGETS,
    flux_inputs,
    output,
    sd3_inputs,
    tiny,
    tiny_flux,
    tiny_unet,
    unet_inputs,
)

LINEAR = {"flux": FLUX_TARGETS, "sd3": SD3_TARGETS, "unet": ["attn1.to_q", "attn2.to_k", "attn2.to_out.0"]}
INPUTS = {"flux": flux_inputs, "sd3": sd3_inputs, "unet": unet_inputs}
KINDS: dict[str, dict[str, Any]] = {
    "ink": {"basis": "qr"},
    "dog": {"basis": "qr"},
    "cat": {"basis": "qr", "side": "input"},
    "owl": {"basis": "qr", "side": "input"},
    "fox": {"basis": "lora"},
}
ROWS = [{"ink": 0.9}, {"dog": -0.5, "ink": 1.0}, {}, {"cat": 1.0, "fox": 0.7}, {"owl": 2.0, "dog": 0.0}, {"ink": 0.9}]


def made(denoiser: nn.Module, targets: list[str], names: Sequence[str] = tuple(KINDS)) -> dict[str, Adapter]:
    """Adapters of random coefficients, taken off the denoiser again."""
    found: dict[str, Adapter] = {}
    for number, name in enumerate(names):
        add_adapter(
            denoiser, AdapterSpec(rank=2 + number % 2, mask="full", target_modules=targets, **KINDS[name]), name
        )
        generator = torch.Generator().manual_seed(number)
        for key, parameter in denoiser.named_parameters():
            if parameter.requires_grad and name in key:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        found[name] = adapter_of(denoiser, name)
        remove_adapter(denoiser, name)
    return found


def batched(kind: str, batch: int) -> dict[str, Tensor]:
    return INPUTS[kind](3, batch=batch)


def item(given: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    return {key: value if "ids" in key else value[number : number + 1] for key, value in given.items()}


def alone(denoiser: nn.Module, adapters: Mapping[str, Adapter], row: Mapping[str, float], given: Any) -> Tensor:
    """By peft's own layers."""
    for name in row:
        attach_adapter(denoiser, adapters[name], name)
    try:
        if row:
            set_adapters(denoiser, row)
        return output(denoiser, given)
    finally:
        for name in row:
            remove_adapter(denoiser, name)


@pytest.mark.parametrize("kind", ["flux", "sd3", "unet"])
def test_each_picture_of_a_mixed_batch_is_the_one_alone(kind: str) -> None:
    denoiser = tiny(kind).requires_grad_(False)
    adapters = made(denoiser, LINEAR[kind])
    given = batched(kind, len(ROWS))
    base = output(denoiser, given)
    wanted = torch.cat([alone(denoiser, adapters, row, item(given, i)) for i, row in enumerate(ROWS)])
    assert all(float((wanted[i] - base[i]).abs().max()) > 1e-3 for i, row in enumerate(ROWS) if row)
    bank = AdapterBank(denoiser)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    bank.switch(ROWS)
    assert torch.allclose(output(denoiser, given), wanted, rtol=0, atol=1e-5)
    bank.switch([])
    other = torch.cat([alone(denoiser, adapters, ROWS[1], item(given, i)) for i in range(2)])
    bank.switch(ROWS[1:2])  # one for all
    assert torch.allclose(output(denoiser, given)[:2], other, rtol=0, atol=1e-5)
    bank.switch([])
    assert torch.equal(output(denoiser, given), base)


def test_guidance_doubles_the_rows() -> None:
    denoiser = tiny("sd3").requires_grad_(False)
    adapters = made(denoiser, SD3_TARGETS, ("ink", "cat"))
    given = {key: torch.cat([value, value]) for key, value in batched("sd3", 2).items()}
    bank = AdapterBank(denoiser)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    with bank.rows([{"ink": 1.0}, {"cat": 0.5}]):
        found = output(denoiser, given)
    assert torch.allclose(found[:2], found[2:], rtol=0, atol=1e-6)
    assert torch.allclose(found[:1], alone(denoiser, adapters, {"ink": 1.0}, item(given, 0)), rtol=0, atol=1e-5)
    assert torch.allclose(found[3:], alone(denoiser, adapters, {"cat": 0.5}, item(given, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", ["bank", "peft"])
@pytest.mark.parametrize("form", [{"basis": "qr", "mask": "full"}, {"basis": "dora"}])
def test_adapters_attached_through_peft_act_beside_a_banks(first: str, form: dict[str, Any]) -> None:
    """Whichever is there first, and whether the attached one is computed in one product with the base or not."""
    denoiser = tiny("sd3").requires_grad_(False)
    adapters = made(denoiser, SD3_TARGETS, ("ink", "dog", "cat"))
    add_adapter(denoiser, AdapterSpec(rank=2, target_modules=SD3_TARGETS, **form), "attached")
    for key, parameter in denoiser.named_parameters():
        if parameter.requires_grad and "attached" in key:
            parameter.data = parameter + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
    attached = adapter_of(denoiser, "attached")
    given, row, other = batched("sd3", 2), {"dog": 0.8, "cat": 0.5}, {"ink": 1.0}
    wanted: list[Tensor] = []
    for number, chosen in enumerate((row, other)):
        for name in chosen:
            attach_adapter(denoiser, adapters[name], name)
        set_adapters(denoiser, {"attached": 1.0, **chosen})
        wanted.append(output(denoiser, item(given, number)))
        for name in chosen:
            remove_adapter(denoiser, name)
    alone_attached = output(denoiser, given)
    fresh = tiny("sd3").requires_grad_(False)
    bank = AdapterBank(fresh)

    def fill() -> None:
        for name, adapter in adapters.items():
            bank.add(name, adapter)

    if first == "bank":
        fill()
    attach_adapter(fresh, attached, "attached")
    if first == "peft":
        fill()
    bank.switch([row, other])
    assert torch.allclose(output(fresh, given), torch.cat(wanted), rtol=0, atol=1e-5)
    bank.close()
    assert torch.allclose(output(fresh, given), alone_attached, rtol=0, atol=1e-6)
    assert not any(module._forward_hooks for module in fresh.modules())


class OneLayer(nn.Module):
    """A denoiser of one Linear."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.layer = linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.layer(hidden_states)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 3), st.booleans(), st.integers(0, 2**31))
def test_sums_are_those_of_the_formula(
    data: st.DataObject, rows: int, times: int, output_side: bool, seed: int
) -> None:
    """In float64, from the dense updates."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(6, 5)
    shared = torch.randn(5, 3, generator=generator) if output_side else torch.randn(3, 6, generator=generator)
    bank, updates = AdapterBank(OneLayer(linear)), dict[str, Tensor]()
    for name in ("one", "two", "three"):
        own = torch.randn(3, 6, generator=generator) if output_side else torch.randn(5, 3, generator=generator)
        pair = LowRank(shared, own) if output_side else LowRank(own, shared)
        header = Header(rank=3, basis="qr", side="output" if output_side else "input")
        bank.add(name, Adapter({"layer": pair}, header))
        updates[name] = pair.delta().double()
    weight = st.floats(-2, 2, width=16)
    chosen = [data.draw(st.dictionaries(st.sampled_from(list(updates)), weight, max_size=3)) for _ in range(rows)]
    x = torch.randn(rows * times, 4, 6, generator=generator)
    with torch.no_grad(), bank.rows(chosen):
        found = bank._modules["transformer"](x)
    for i in range(rows * times):
        dense = linear.weight.detach().double() + sum(
            (w * updates[n] for n, w in chosen[i % rows].items()), torch.zeros(())
        )
        expected = x[i].double() @ dense.T + linear.bias.detach().double()
        assert torch.allclose(found[i].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_hundred_take_the_room_of_their_own_numbers() -> None:
    denoiser = tiny_flux().requires_grad_(False)
    first = made(denoiser, FLUX_TARGETS, ("ink",))["ink"]
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    bank = AdapterBank(denoiser)
    numbers = sum(pair.A.numel() for pair in first.layers.values())
    shared = sum(pair.B.numel() for pair in first.layers.values())
    for number in range(100):
        bank.add(f"n{number}", first.scaled(float(number)))
    assert bank.nbytes == 4 * (shared + 100 * numbers)
    assert bank.names[::99] == ("n0", "n99")
    bank.switch([{"n7": 1.0}])
    seven = output(denoiser, flux_inputs())
    bank.switch([{"n1": 7.0}])
    assert torch.allclose(output(denoiser, flux_inputs()), seven, rtol=0, atol=1e-5)
    bank.remove("n7")
    assert bank.nbytes == 4 * (shared + 99 * numbers)
    with pytest.raises(QrloraError, match="there is no adapter 'n7' in the bank"):
        bank.switch([{"n7": 1.0}])
    bank.close()
    assert bank.nbytes == 0
    after = denoiser.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(module._forward_hooks for module in denoiser.modules())
    assert not denoiser._forward_pre_hooks


def test_a_bank_in_half_precision_computes_in_it() -> None:
    denoiser = tiny_flux().requires_grad_(False)
    adapter = made(denoiser, FLUX_TARGETS, ("ink",))["ink"]
    exact = AdapterBank(denoiser)
    exact.add("ink", adapter)
    with exact.rows([{"ink": 1.0}]):
        wanted = output(denoiser, flux_inputs())
    base = output(denoiser, flux_inputs())
    exact.close()
    half = tiny_flux().to(torch.bfloat16).requires_grad_(False)
    bank = AdapterBank(half)
    bank.add("ink", Adapter(adapter.layers, None))
    with bank.rows([{"ink": 1.0}, {}]):
        found = output(half, flux_inputs())
    assert found.dtype == torch.bfloat16
    assert float((found[0].float() - wanted[0]).norm() / (wanted[0] - base[0]).norm()) < 0.1


def test_what_a_bank_refuses() -> None:
    denoiser = tiny_flux().requires_grad_(False)
    adapter = made(denoiser, FLUX_TARGETS, ("ink",))["ink"]
    bank = AdapterBank(denoiser)
    bank.add("ink", adapter)
    with pytest.raises(QrloraError, match="already an adapter 'ink' in the bank"):
        bank.add("ink", adapter)
    with pytest.raises(QrloraError, match="not a finite number"):
        bank.switch([{"ink": float("inf")}])
    with pytest.raises(QrloraError, match="was trained on another base model"):
        AdapterBank(tiny_flux(1).requires_grad_(False)).add("ink", adapter)
    with pytest.raises(QrloraError, match="adapts the unet, which is not there"):
        bank.add("other", Adapter(adapter.layers, None, "unet"))
    bank.switch([{"ink": 1.0}, {}, {}])
    with pytest.raises(QrloraError, match="the batch has 2 items and adapters are chosen for 3"):
        output(denoiser, flux_inputs())
    bank.switch([{"ink": 1.0}, {}])
    layer = adaptable_layers(denoiser)["transformer_blocks.0.attn.to_q"]
    output(denoiser, flux_inputs())
    with pytest.raises(QrloraError, match=r"transformer_blocks\.0\.attn\.to_q is given 3 items where the batch has 2"):
        layer(torch.zeros(3, 1, 32))


def test_forms_and_convolutions_that_are_refused() -> None:
    denoiser = tiny_unet().requires_grad_(False)
    add_adapter(denoiser, AdapterSpec(rank=1, target_modules=["conv1"]), "convolution")
    convolution = adapter_of(denoiser, "convolution")
    remove_adapter(denoiser, "convolution")
    add_adapter(denoiser, AdapterSpec(rank=1, basis="dora", target_modules=["attn1.to_q"]), "rescaled")
    rescaled = adapter_of(denoiser, "rescaled")
    remove_adapter(denoiser, "rescaled")
    bank = AdapterBank(denoiser)
    with pytest.raises(QrloraError, match=r"adapts the convolution .*conv1, and only Linear layers"):
        bank.add("one", convolution)
    with pytest.raises(QrloraError, match="is a dora adapter and cannot be mixed within a batch"):
        bank.add("two", rescaled)
    assert bank.names == ()
    assert bank.nbytes == 0
