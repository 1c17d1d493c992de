"""Two processes of one launch train what one trains alone; two launches, since starting takes longest."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qrlora.adapter import BasisCache
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, read_adapter
from qrlora.models import LoadedModel
from qrlora.training import Checkpoint, TrainConfig, latest_checkpoint, train
from qrlora.training.processes import asks_for_sharding, join_launch
from tests.training.conftest import MakeConfig
from tests.training.launching import finish, start

CHILD = """
import json, os, sys
from pathlib import Path

import torch

import qrlora.adapter._cache as cache
from qrlora.adapter import AdapterSpec, BasisCache, add_adapter, trainable_parameters
from qrlora.errors import QrloraError
from qrlora.training import TrainConfig, leave_launch, train
from qrlora.training import loop, sharding
from tests.tiny_models import TARGETS, inputs, run, tiny

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
told = {"computed": 0}
make_basis, shard = cache.make_basis, sharding.shard

def counted(*given, **named):
    told["computed"] += 1
    return make_basis(*given, **named)

def size(denoiser):
    base = [each for name, each in denoiser.named_parameters() if "lora_" not in name]
    return sum((each.to_local() if hasattr(each, "to_local") else each).numel() for each in base)

def measured(denoiser, device, processes):
    told["whole"] = size(denoiser)
    shard(denoiser, device, processes)
    told["share"] = size(denoiser)

cache.make_basis, loop.shard = counted, measured
for config in json.loads((folder / "plain.json").read_text()):
    train(TrainConfig.parse(config), progress=False)
told["computed_by_training"] = told["computed"]

os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
for config in json.loads((folder / "sharded.json").read_text()):
    train(TrainConfig.parse(config), progress=False)
try:
    train(TrainConfig.parse(config | {"output_dir": str(folder / "no"), "offload": "blocks"}), progress=False)
except QrloraError as error:
    told["refused"] = str(error)

told["families"] = {}
for kind in ("sd3", "unet"):
    model = tiny(kind).requires_grad_(False)
    spec = AdapterSpec(rank=2, basis="random", target_modules=TARGETS[kind])
    add_adapter(model, spec, "one", cache=BasisCache(folder))
    parameters = trainable_parameters(model, "one")
    generator = torch.Generator().manual_seed(0)
    for each in parameters.values():
        each.data = torch.randn(each.shape, generator=generator).triu_()
    found = []
    for _ in range(2):
        model.zero_grad()
        out = run(model, inputs(kind))
        out.square().mean().backward()
        found.append([out.detach(), *(each.grad.clone() for each in parameters.values())])
        if len(found) == 1:
            shard(model, torch.device("cpu"), 2)
    told["families"][kind] = max(float((a - b).abs().max()) for a, b in zip(*found))
(folder / f"told-{rank}.json").write_text(json.dumps(told))
leave_launch()
"""
DYING = """
import os, signal, sys
from qrlora.cli import main
from qrlora.training.run import Run

train_step = Run.train_step

def dying(self):
    if self.place.process == 1 and self.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    train_step(self)

Run.train_step = dying
sys.exit(main(["train", sys.argv[1]]))
"""
REFUSED = """
import sys
from qrlora.cli import main
sys.exit(main(["trian"]))  # told without loading anything
"""
STEPS = 4


def _written(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_unset=True)


def _distance(one: Adapter, other: Adapter) -> float:
    """The largest difference of trained numbers, relative to the largest number; bases must be the same bits."""
    worst = 0.0
    for a, b in zip(one.components.values(), other.components.values(), strict=True):
        assert a.layers.keys() == b.layers.keys()
        assert all(torch.equal(a.layers[name].B, b.layers[name].B) for name in a.layers)
        largest = max(float(pair.A.abs().max()) for pair in a.layers.values())
        assert largest > 1e-3
        worst = max(worst, *(float((a.layers[n].A - b.layers[n].A).abs().max()) / largest for n in a.layers))
    return worst


def test_two_processes_train_what_one_trains(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str, **changes: Any) -> TrainConfig:
        options = {"max_train_steps": STEPS, "train_batch_size": 4, "adapter": {"rank": 2}}
        return make_config(**options | {"output_dir": str(tmp_path / name), "device": "cpu"} | changes)

    monkeypatch.setenv("QRLORA_CACHE", str(tmp_path / "bases of one"))
    BasisCache.forget()
    words = {"train_text_encoder": True, "max_train_steps": 2, "gradient_accumulation_steps": 2}
    alone = train(config("alone"), loaded=model, progress=False)
    with_words = train(config("alone with words", **words), loaded=model, progress=False)
    begun = str(tmp_path / "alone" / "checkpoint-2")
    logged = {"report_to": "tensorboard"} if find_spec("tensorboard") is not None else {}
    plain = [
        config("shared", train_batch_size=2, **logged),
        config("continued", train_batch_size=1, gradient_accumulation_steps=2, resume=begun),
        config("with words", train_batch_size=2, **words),
        config("streamed", train_batch_size=2, offload="blocks"),
    ]
    pictures = {"validation_prompt": "a dog", "validation_steps": STEPS, "gradient_checkpointing": True}
    sharded = [config("sharded", train_batch_size=2, **pictures)]
    (tmp_path / "plain.json").write_text(json.dumps([_written(each) for each in plain]))
    (tmp_path / "sharded.json").write_text(json.dumps([_written(each) for each in sharded]))
    cache = {"QRLORA_CACHE": str(tmp_path / "bases of two")}
    codes, said = finish(start(CHILD, str(tmp_path), folder=tmp_path, environment=cache), tmp_path)
    assert codes == [0, 0], said

    wanted = read_adapter(alone.path)
    for name in ("shared", "continued", "streamed", "sharded"):
        found = tmp_path / name
        assert _distance(wanted, read_adapter(found / "adapter.safetensors")) < 1e-4, name
        losses = json.loads((found / "losses.json").read_text())["loss"]
        assert losses == pytest.approx(alone.losses, rel=1e-5), name
    assert (
        _distance(read_adapter(with_words.path), read_adapter(tmp_path / "with words" / "adapter.safetensors")) < 1e-4
    )

    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    _check_bases(tmp_path, [each["computed_by_training"] for each in told])
    _check_sharding(tmp_path, told)
    _check_goes_on_alone(config("sharded again", resume=str(tmp_path / "sharded" / "checkpoint-2")), model, wanted)


def _check_bases(folder: Path, computed: list[int]) -> None:
    """Each basis was computed once, by one of the two, with the bits that one process alone gives it."""
    one, two = ({path.name: path.read_bytes() for path in (folder / f"bases of {n}").iterdir()} for n in ("one", "two"))
    assert one == two
    # The text encoder's few are computed by both.
    assert min(computed) > len(one) // 3
    assert sum(computed) < 1.5 * len(one)


def _check_sharding(folder: Path, told: list[dict[str, Any]]) -> None:
    assert sum(each["share"] for each in told) < 1.1 * told[0]["whole"]  # what cannot be halved evenly is padded
    assert max(each["share"] for each in told) < 0.6 * told[0]["whole"]
    assert all("offload: blocks and --use_fsdp" in each["refused"] for each in told)
    assert all(max(each["families"].values()) < 1e-6 for each in told)
    assert [path.name for path in (folder / "sharded" / "validation").iterdir()] == [f"step-{STEPS:06d}-0.png"]
    assert not (folder / "no").exists()


def _check_goes_on_alone(config: TrainConfig, model: LoadedModel, wanted: Adapter) -> None:
    assert _distance(wanted, read_adapter(train(config, loaded=model, progress=False).path)) < 1e-4


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_when_one_is_killed_the_other_says_so(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    options = {"max_train_steps": 6, "checkpointing_steps": 2, "adapter": {"rank": 2}, "device": "cpu"}
    config = make_config(**options, train_batch_size=1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(_written(config)))
    codes, said = finish(start(DYING, str(tmp_path / "config.yaml"), folder=tmp_path), tmp_path)
    assert codes == [2, -9], said
    kept = tmp_path / "out" / "checkpoint-2"
    assert "qrlora: process 1 of 2 is gone" in said
    assert f"the last complete checkpoint is {kept}; continue with resume: latest" in said
    assert "Traceback" not in said
    newest = latest_checkpoint(tmp_path / "out")
    assert isinstance(newest, Checkpoint)
    assert newest.folder == kept
    whole = train(make_config(**options, output_dir=str(tmp_path / "whole")), loaded=model, progress=False)
    resumed = train(make_config(**options, resume="latest"), loaded=model, progress=False)
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-5)
    assert _distance(read_adapter(whole.path), read_adapter(resumed.path)) < 1e-4


def test_what_all_processes_refuse_is_said_once(tmp_path: Path) -> None:
    codes, said = finish(start(REFUSED, folder=tmp_path), tmp_path)
    assert codes == [2, 2]
    assert said.strip() == "qrlora: unknown verb 'trian'; did you mean train?"


def test_launches_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class One:
        num_processes = 1

    class Two:
        num_processes = 2

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    accelerator: Any = Two()
    with pytest.raises(QrloraError, match="launch with --fsdp_version 2"):
        asks_for_sharding(accelerator)
    accelerator = One()
    assert not asks_for_sharding(accelerator)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    # A launch of several on which accelerate already settled as one.
    assert os.environ.get("WORLD_SIZE") is None
    join_launch(None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(QrloraError, match="2 processes were launched, but each sees 1 only"):
        join_launch("cpu")
