"""Adapters within ranges of timesteps, against adapters switched by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qrlora.adapter import adapters_by_timestep, adapters_disabled, add_adapter, set_adapters
from qrlora.errors import QrloraError
from tests.adapter.test_add_adapter import shake, spec_for
from tests.tiny_models import TARGETS, inputs, output, tiny

WEIGHTS = {"content": 0.9, "style": 0.7}
RANGES = {"content": (500.0, 1000.0), "style": (0.0, 700.0)}


def _with_two(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    denoiser = tiny(kind).to(dtype)
    for seed, name in enumerate(WEIGHTS):
        add_adapter(denoiser, spec_for(kind), name)
        shake(denoiser, name, seed=seed)
    return denoiser


def _inputs_at(kind: str, timestep: float) -> dict[str, Tensor]:
    """One timestep for the whole batch, as the kind's pipeline hands it over."""
    given = inputs(kind)
    given["timestep"] = torch.full_like(given["timestep"], timestep / 1000 if kind == "flux" else timestep)
    return given


def _scale(kind: str) -> Any:
    return (lambda timesteps: timesteps / 1000) if kind == "flux" else (lambda timesteps: timesteps)


def _by_hand(denoiser: nn.Module, kind: str, timestep: float) -> Tensor:
    acting = {name: WEIGHTS[name] for name, (low, high) in RANGES.items() if low <= timestep <= high}
    set_adapters(denoiser, acting)
    return output(denoiser, _inputs_at(kind, timestep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TARGETS)
def test_each_call_has_the_adapters_of_its_timestep(kind: str, dtype: torch.dtype) -> None:
    denoiser, timesteps = _with_two(kind, dtype), (1000.0, 800.0, 700.0, 600.0, 500.0, 320.0, 4.0, 900.0)
    expected = [_by_hand(denoiser, kind, timestep) for timestep in timesteps]
    assert len({tuple(value.flatten().tolist()) for value in expected}) == len(timesteps)
    with adapters_by_timestep(denoiser, WEIGHTS, RANGES, _scale(kind)):
        for timestep, value in zip(timesteps, expected, strict=True):
            assert torch.equal(output(denoiser, _inputs_at(kind, timestep)), value), timestep
    set_adapters(denoiser, WEIGHTS)
    both = output(denoiser, _inputs_at(kind, 100.0))
    with adapters_by_timestep(denoiser, WEIGHTS, RANGES, _scale(kind)):
        output(denoiser, _inputs_at(kind, 100.0))
    assert torch.equal(output(denoiser, _inputs_at(kind, 100.0)), both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bound_is_rounded_as_the_timestep_is(dtype: torch.dtype) -> None:
    """0.7 in bf16 is 0.699; the range from 700 on includes the step that is given as that."""
    denoiser = _with_two("flux", dtype)
    given = _inputs_at("flux", 700.0)
    given["timestep"] = torch.tensor([700.0, 700.0]).to(dtype) / 1000
    set_adapters(denoiser, {"content": 1.0})
    expected = output(denoiser, given)
    with adapters_by_timestep(denoiser, {"content": 1.0}, {"content": (700.0, 1000.0)}, _scale("flux")):
        assert torch.equal(output(denoiser, given), expected)


@pytest.mark.parametrize("kind", TARGETS)
def test_none_acting_is_the_base_bit_for_bit(kind: str) -> None:
    denoiser, given = _with_two(kind), _inputs_at(kind, 600.0)
    with adapters_disabled(denoiser):
        base = output(denoiser, given)
    for weights, ranges in (
        (WEIGHTS, {"content": (0.0, 10.0), "style": (601.0, 601.0)}),
        ({"content": 0.0}, {}),
        ({"content": 0.0, "style": 1.0}, {"style": (0.0, 599.0)}),
    ):
        with adapters_by_timestep(denoiser, weights, ranges, _scale(kind)):
            assert torch.equal(output(denoiser, given), base)
        set_adapters(denoiser, WEIGHTS)
        assert not torch.equal(output(denoiser, given), base)


def test_disabled_layers_are_disabled_again() -> None:
    denoiser, given = _with_two("flux"), _inputs_at("flux", 600.0)
    with adapters_disabled(denoiser):
        base = output(denoiser, given)
        with adapters_by_timestep(denoiser, WEIGHTS, RANGES, _scale("flux")):
            assert not torch.equal(output(denoiser, given), base)
        assert torch.equal(output(denoiser, given), base)
    assert not torch.equal(output(denoiser, given), base)


def test_a_positional_timestep_is_found() -> None:
    denoiser, given = _with_two("unet"), _inputs_at("unet", 800.0)
    expected = _by_hand(denoiser, "unet", 800.0)
    with adapters_by_timestep(denoiser, WEIGHTS, RANGES), torch.no_grad():
        for timestep in (torch.tensor(800), 800):  # as schedulers of integer timesteps have it
            found = denoiser(given["sample"], timestep, given["encoder_hidden_states"], return_dict=False)[0]
            assert torch.equal(found, expected)


def test_refusals() -> None:
    denoiser = _with_two("sd3")
    for weights, ranges, words in (
        ({"other": 1.0}, {}, "there is no adapter 'other'"),
        ({"content": 1.0}, {"style": (0.0, 1.0)}, "range of timesteps for 'style', but no weight"),
        ({"content": 1.0}, {"content": (700.0, 300.0)}, "content: 700 to 300 is no range of timesteps"),
        ({"content": 1.0}, {"content": (0.0, 1001.0)}, "0 to 1001 is no range"),
        ({"content": 1.0}, {"content": (float("nan"), 1.0)}, "is no range"),
    ):
        with pytest.raises(QrloraError, match=words), adapters_by_timestep(denoiser, weights, ranges):
            pass
    with adapters_by_timestep(denoiser, WEIGHTS, RANGES):
        with pytest.raises(QrloraError, match="one timestep each"):
            output(denoiser, inputs("sd3"))
        with pytest.raises(QrloraError, match="SD3Transformer2DModel was called without a timestep"):
            output(denoiser, {key: value for key, value in inputs("sd3").items() if key != "timestep"})
    assert not denoiser._forward_pre_hooks
