"""Every optimiser: what it computes, that masks hold, and that a stopped run goes on to the same bits."""

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qrlora.adapter import AdapterSpec, add_adapter, trainable_parameters
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import read_adapter, read_safetensors
from qrlora.models import LoadedModel
from qrlora.training import Interrupted, TrainConfig, train
from qrlora.training import optimiser as optimisers
from qrlora.training.optimiser import load_optimiser_tensors, make_optimiser, optimiser_tensors
from tests.tiny_models import tiny_flux
from tests.training.conftest import MakeConfig

WAYS: dict[str, dict[str, Any]] = {
    "adamw": {"learning_rate": 1e-2},
    "8bit": {"learning_rate": 1e-2, "use_8bit_adam": True},
    "prodigy": {"learning_rate": 1.0, "optimizer": "prodigy"},
    "prodigy-coupled": {"learning_rate": 1.0, "optimizer": "prodigy", "prodigy_decouple": False, "prodigy_beta3": 0.9},
}


@pytest.fixture
def small_states_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters of a tiny model are below the size from which states are quantised."""
    monkeypatch.setattr(optimisers, "_EIGHT_BIT_LEAST", 64)


def config_of(**changes: Any) -> TrainConfig:
    return TrainConfig.parse({"instance_data_dir": "x", "output_dir": "y", "adam_weight_decay": 0.1, **changes})


def gradients_of(count: int, shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def trajectory(config: TrainConfig, start: Tensor, gradients: list[Tensor], pull: float = 0.0) -> Tensor:
    """Steps along `gradients + pull * parameter`."""
    parameter = nn.Parameter(start.clone())
    optimiser = make_optimiser(config, [parameter])
    for gradient in gradients:
        parameter.grad = gradient + pull * parameter.detach()
        optimiser.step()
    return parameter.detach()


def adamw_by_hand(start: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Algorithm 2 of arXiv 1711.05101 in float64."""
    p, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for t, g in enumerate(gradients, 1):
        g = g.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - lr * decay * p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p


def prodigy_by_hand(
    start: Tensor, gradients: list[Tensor], decay: float, *, lr: float, correct: bool, safeguard: bool, beta3: float
) -> Tensor:
    """Algorithm 4 of arXiv 2306.06101 in float64, with decoupled decay; its bias correction scales the rate."""
    p, x0 = start.double(), start.double()
    m = v = s = torch.zeros_like(p)
    d = d0 = 1e-6
    r = 0.0
    for k, g in enumerate(gradients):
        g = g.double() + p
        corrected = math.sqrt(1 - 0.999 ** (k + 1)) / (1 - 0.9 ** (k + 1)) if correct else 1.0
        rate = d * lr * corrected
        r = beta3 * r + d / d0 * rate * float((g * (x0 - p)).sum())
        s = beta3 * s + d / d0 * (d if safeguard else rate) * g
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * d * d * g * g
        d = max(d, r / float(s.abs().sum()))
        p = p - decay * rate * p - rate * m / (v.sqrt() + d * 1e-8)
    return p


def test_adamw_is_its_formula() -> None:
    start, gradients = torch.linspace(-1, 1, 60).reshape(6, 10), gradients_of(20, (6, 10))
    found = trajectory(config_of(learning_rate=1e-2), start, gradients)
    torch.testing.assert_close(found.double(), adamw_by_hand(start, gradients, 1e-2, 0.1), rtol=1e-5, atol=1e-6)


def test_adamw_in_8_bits_is_near_its_formula_with_states_a_quarter_as_large() -> None:
    start, gradients = torch.linspace(-1, 1, 4096).reshape(64, 64), gradients_of(20, (64, 64))
    found = trajectory(config_of(learning_rate=1e-2, use_8bit_adam=True), start, gradients)
    expected = adamw_by_hand(start, gradients, 1e-2, 0.1)
    assert float((found - expected).norm()) < 0.1 * float((expected - start).norm())
    parameter = nn.Parameter(start.clone())
    optimiser = make_optimiser(config_of(use_8bit_adam=True), [parameter])
    parameter.grad = gradients[0]
    optimiser.step()
    states = [value for value in optimiser.state[parameter].values() if isinstance(value, Tensor)]
    assert [state.dtype for state in states if state.shape == start.shape] == [torch.uint8, torch.uint8]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"correct": True, "safeguard": True, "beta3": math.sqrt(0.999)}),
        (
            {
                "prodigy_use_bias_correction": False,
                "prodigy_safeguard_warmup": False,
                "prodigy_beta3": 0.9,
            },
            {"correct": False, "safeguard": False, "beta3": 0.9},
        ),
    ],
    ids=["as diffusers", "otherwise"],
)
def test_prodigy_is_its_formula(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    """Down a bowl, from which the estimate of the distance grows from 1e-6."""
    start, target = torch.zeros(40), torch.linspace(0.5, 1, 40)
    gradients = [0.1 * noise - target for noise in gradients_of(200, (40,))]
    found = trajectory(config_of(optimizer="prodigy", **changes), start, gradients, pull=1.0)
    by_hand = prodigy_by_hand(start, gradients, 0.1, lr=1.0, **expected)
    assert float(by_hand.abs().max()) > 0.1
    torch.testing.assert_close(found.double(), by_hand, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mask", ["output", "input"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("small_states_in_8_bits")
def test_masked_coefficients_stay_exactly_zero(way: str, mask: str) -> None:
    denoiser = tiny_flux()
    add_adapter(denoiser, AdapterSpec(rank=6, side=mask, init="normal"), "content")
    parameters = trainable_parameters(denoiser, "content")
    optimiser = make_optimiser(config_of(**WAYS[way]), parameters.values())
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for parameter in parameters.values():
            (parameter * torch.randn(parameter.shape, generator=generator)).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    for name, parameter in parameters.items():
        values = parameter.detach()
        outside = values.tril(-1) if "lora_A" in name else values.triu(1)
        assert int(outside.count_nonzero()) == 0, name
        assert int(values.count_nonzero()) > 6, name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("small_states_in_8_bits")
def test_states_come_back_from_their_tensors(way: str) -> None:
    """Into a fresh optimiser, whose further steps are then the same bits."""
    config, gradients = config_of(**WAYS[way]), gradients_of(8, (16, 16))
    whole = trajectory(config, torch.ones(16, 16), gradients)
    first = nn.Parameter(torch.ones(16, 16))
    before = make_optimiser(config, [first])
    for gradient in gradients[:5]:
        first.grad = gradient.clone()
        before.step()
    tensors = optimiser_tensors(before, {"a.weight": first})
    assert {key.partition("/")[0] for key in tensors} >= {"param"}
    second = nn.Parameter(torch.zeros(16, 16))
    after = make_optimiser(config, [second])
    load_optimiser_tensors(after, {"a.weight": second}, {key: value.clone() for key, value in tensors.items()})
    for gradient in gradients[5:]:
        second.grad = gradient.clone()
        after.step()
    assert torch.equal(second, whole)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "adamw"])
@pytest.mark.usefixtures("small_states_in_8_bits")
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, way: str
) -> None:
    options = {**WAYS[way], "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2, "adam_weight_decay": 0.1}

    def run(config: TrainConfig, **more: Any) -> bytes:
        return train(config, loaded=model, progress=False, **more).path.read_bytes()

    def interrupt(done: int, _total: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    whole = run(make_config(**options, output_dir=str(tmp_path / "whole")))
    with pytest.raises(Interrupted):
        run(make_config(**options), on_step=interrupt)
    assert run(make_config(**options, resume="latest")) == whole
    states = [tmp_path / name / "checkpoint-6" / "state.safetensors" for name in ("whole", "out")]
    assert states[0].read_bytes() == states[1].read_bytes()
    for pair in read_adapter(tmp_path / "whole" / "adapter.safetensors").layers.values():
        assert int(pair.A.tril(-1).count_nonzero()) == 0
        assert int(pair.A.count_nonzero()) > 0
    kinds = {key.partition("/")[0] for key in read_safetensors(states[0])[0]}
    assert kinds >= ({"state1", "absmax1", "qmap1", "step"} if way == "8bit" else {"s", "p0", "group", "step"})
    with pytest.raises(QrloraError, match=r"cannot resume from .*(optimizer|use_8bit_adam|learning_rate) differs"):
        run(make_config(**options | {"optimizer": "adamw", "use_8bit_adam": False, "resume": "latest"}))


def test_prodigys_rate_is_1_unless_given() -> None:
    """A model's default rate is for AdamW."""
    from_model = {"learning_rate": 4e-3}
    assert config_of(optimizer="Prodigy").with_defaults(from_model).learning_rate == 1
    assert config_of().with_defaults(from_model).learning_rate == 4e-3
    assert config_of().with_defaults({"optimizer": "prodigy", "learning_rate": 0.5}).learning_rate == 0.5
    assert config_of().with_defaults({"optimizer": "prodigy"}).learning_rate == 1
    parameter = nn.Parameter(torch.zeros(2))
    make_optimiser(config_of(optimizer="prodigy"), [parameter])
    with pytest.warns(QrloraWarning, match=r"learning_rate=0\.004 multiplies the rate that prodigy finds"):
        make_optimiser(config_of(optimizer="prodigy", learning_rate=4e-3), [parameter])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "prodigy"}, r"optimizer: prodigy needs the package prodigyopt.*pip install prodigyopt"),
        ({"use_8bit_adam": True}, r"use_8bit_adam needs the package bitsandbytes.*pip install bitsandbytes"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_loaded(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(optimisers, "find_spec", lambda _name: None)
    with pytest.raises(QrloraError, match=words):
        train(make_config(model="no/such-model", **changes), progress=False)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(QrloraError, match="use_8bit_adam is for AdamW, not for optimizer: prodigy"):
        config_of(optimizer="prodigy", use_8bit_adam=True)
    with pytest.raises(QrloraError, match="optimizer='lion' is not valid"):
        config_of(optimizer="lion")


def test_a_device_without_kernels_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim import AdamW8bit

    def step(_self: Any) -> None:
        raise NotImplementedError(
            "Could not run 'bitsandbytes::optimizer_update_8bit_blockwise' on this backend.\nMore"
        )

    monkeypatch.setattr(AdamW8bit, "step", step)
    with pytest.raises(
        QrloraError, match=r"use_8bit_adam: the installed bitsandbytes cannot compute on cpu \(Could not"
    ):
        make_optimiser(config_of(use_8bit_adam=True), [nn.Parameter(torch.zeros(8))])
