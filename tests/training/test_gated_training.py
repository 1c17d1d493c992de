"""Gated adapters through the one training loop: resumed runs are the uninterrupted ones, bit for bit."""

import signal
from pathlib import Path

import pytest
import torch

from qrlora.adapter import attach_adapter, record_usage, remove_adapter
from qrlora.errors import QrloraError
from qrlora.formats import read_adapter
from qrlora.models import LoadedModel
from qrlora.training import Interrupted, train
from tests.training.conftest import MakeConfig

GATED = {"rank": 8, "experts": 4, "top_k": 2, "lora_alpha": 4.0}


def test_interrupted_and_resumed_is_uninterrupted(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    whole = train(make_config(adapter=GATED, output_dir=str(tmp_path / "whole")), loaded=model, progress=False)

    def interrupt(done: int, _total: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(make_config(adapter=GATED), loaded=model, progress=False, on_step=interrupt)
    resumed = train(make_config(adapter=GATED, resume="latest"), loaded=model, progress=False)
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert resumed.losses == whole.losses
    adapter = read_adapter(resumed.path)
    trained = sum(
        pair.A.numel() + adapter.own[layer]["gate_weight"].numel() + adapter.own[layer]["gate_bias"].numel()
        for layer, pair in adapter.layers.items()
    )
    assert resumed.parameters == trained
    assert any(bool(pair.A.any()) for pair in adapter.layers.values())
    attach_adapter(model.denoiser, adapter, "result")
    with record_usage(model.denoiser, "result") as usage, torch.no_grad():
        conditioning = model.family.encode_prompts(model.pipeline, ["a <c> dog"], 16)
        model.family.predict(model.denoiser, torch.randn(1, 4, 4, 4), torch.tensor([0.5]), conditioning, 1.0)
    remove_adapter(model.denoiser, "result")
    assert sorted(usage.layers) == sorted(adapter.layers)


def test_other_experts_are_another_run(make_config: MakeConfig, model: LoadedModel) -> None:
    train(make_config(adapter=GATED, max_train_steps=2), loaded=model, progress=False)
    with pytest.raises(QrloraError, match=r"adapter\.experts differs"):
        train(
            make_config(adapter=GATED | {"experts": 2}, max_train_steps=4, resume="latest"),
            loaded=model,
            progress=False,
        )
