"""Many adapters at once: each is what the library makes of it alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.fusion.draw import Picture, draw
from benchmarks.fusion.many import ManyLinear, carrying, stacked
from benchmarks.fusion.schedule import by_timesteps
from benchmarks.fusion.teach import Lesson, clip_each, configuration, teach
from qrlora.adapter import AdapterSpec, attach_adapter, remove_adapter, set_adapters
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, read_adapter
from qrlora.models import LoadedModel, load_pipeline
from qrlora.training import TrainConfig, train

SPECS: dict[str, dict[str, Any]] = {
    "qr": {"basis": "qr"},
    "lora": {"basis": "lora"},
    "input": {"basis": "qr", "side": "input"},
    "both": {"basis": "qr", "form": "both"},
    "core": {"basis": "svd", "form": "core"},
    "dora": {"basis": "dora"},
    "gated": {"basis": "qr", "experts": 2},
}
STEPS = 3


@pytest.fixture(scope="module")
def model(tiny_flux: Path) -> LoadedModel:
    return load_pipeline(tiny_flux)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (3, 64, 64, 3), np.uint8)


def taught(model: LoadedModel, pictures: np.ndarray, spec: AdapterSpec, lessons: int = 2) -> list[Adapter]:
    config = configuration(spec, 2e-3, STEPS, 2, 5)
    made = teach(model, config, [Lesson([pictures[i]], ["a <c> emoji"]) for i in range(lessons)])[STEPS]
    return [each.adapter for each in made if each.adapter is not None]


@pytest.mark.parametrize("name", SPECS)
def test_an_adapter_taught_among_others_is_the_one_that_train_makes(
    name: str, model: LoadedModel, pictures: np.ndarray, tmp_path: Path
) -> None:
    spec = AdapterSpec(rank=2, **SPECS[name])
    before = weights(model.denoiser)
    one = taught(model, pictures, spec)[1]
    Image.fromarray(pictures[1]).save(tmp_path / "one.png")
    values = {
        "instance_data_dir": str(tmp_path / "one.png"),
        "instance_prompt": "a <c> emoji",
        "output_dir": str(tmp_path / "out"),
        "adapter": spec.model_dump(),
        "resolution": 64,
        "learning_rate": 2e-3,
        "max_train_steps": STEPS,
        "train_batch_size": 2,
        "seed": 5,
        "mixed_precision": "no",
    }
    other = read_adapter(train(TrainConfig.parse(values), loaded=model, progress=False).path)
    assert one.layers.keys() == other.layers.keys()
    assert max(float(pair.delta().abs().max()) for pair in other.layers.values()) > 1e-4
    for layer, pair in other.layers.items():
        assert torch.allclose(one.layers[layer].delta(), pair.delta(), rtol=0, atol=1e-5), layer
        for key, tensor in other.own.get(layer, {}).items():
            assert torch.allclose(one.own[layer][key], tensor, rtol=0, atol=1e-5), (layer, key)
    assert one.header is not None
    assert one.header.form == (other.header.form if other.header else None)
    after = weights(model.denoiser)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_looks_and_flips_are_those_of_train(model: LoadedModel, pictures: np.ndarray, tmp_path: Path) -> None:
    spec, more = AdapterSpec(rank=2, basis="lora"), {"looks": ("sepia", "inverted"), "random_flip": True}
    config = configuration(spec, 2e-3, 4, 2, 5, **more)
    one = teach(model, config, [Lesson([pictures[1]], ["a <c> emoji"])])[4][0]
    Image.fromarray(pictures[1]).save(tmp_path / "one.png")
    given = {"instance_data_dir": str(tmp_path / "one.png"), "instance_prompt": "a <c> emoji", "resolution": 64}
    values = {**config.model_dump(exclude_unset=True), **given, "output_dir": str(tmp_path / "out")}
    result = train(TrainConfig.parse(values), loaded=model, progress=False)
    assert one.losses == pytest.approx(result.losses, abs=1e-5)


def weights(denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """Of the base, by path; peft leaves empty wrappers behind."""
    state = denoiser.state_dict().items()
    return {key.replace(".base_layer", ""): tensor.clone() for key, tensor in state}


def test_adapters_at_a_step_between_are_those_of_a_shorter_run(model: LoadedModel, pictures: np.ndarray) -> None:
    spec = AdapterSpec(rank=2, basis="lora")
    lessons = [Lesson([pictures[0], pictures[1]], ["a <c> emoji", "a dog"]), Lesson([pictures[2]], ["a cat"])]
    long = teach(model, configuration(spec, 2e-3, 3, 2, 1), lessons, keep=(2, 99))
    short = teach(model, configuration(spec, 2e-3, 2, 2, 1), lessons)
    assert sorted(long) == [2, 3]
    for one, other in zip(long[2], short[2], strict=True):
        assert one.losses == other.losses
        assert one.adapter is not None
        assert other.adapter is not None
        assert all(torch.equal(one.adapter.layers[k].A, other.adapter.layers[k].A) for k in one.adapter.layers)


@pytest.mark.parametrize("name", ["qr", "both", "dora", "gated"])
def test_a_picture_among_others_is_the_one_drawn_alone(name: str, model: LoadedModel, pictures: np.ndarray) -> None:
    adapters = [_stronger(each) for each in taught(model, pictures, AdapterSpec(rank=2, **SPECS[name]))]
    weights = ((0.5, 1.5), (1.0, -0.5))
    wanted = [Picture("a dog", i, tuple(zip(adapters, weights[i], strict=True))) for i in range(2)]
    drawn = draw(model, wanted, together=2)
    for i, picture in enumerate(wanted):
        for place, (adapter, _) in enumerate(picture.adapters):
            attach_adapter(model.denoiser, adapter, f"part{place}")
        set_adapters(model.denoiser, {"part0": weights[i][0], "part1": weights[i][1]})
        settings = model.defaults.model_dump()
        alone = np.asarray(model.family.generate(model.pipeline, ["a dog"], seeds=[i], **settings)[0])
        for place in range(2):
            remove_adapter(model.denoiser, f"part{place}")
        assert np.abs(drawn[i].astype(int) - alone).max() <= 1
    base = draw(model, [Picture("a dog", 0)])[0]
    assert np.abs(drawn[0].astype(int) - base).max() > 3


def _stronger(adapter: Adapter) -> Adapter:
    return Adapter(adapter.scaled(20.0).layers, adapter.header, adapter.component, own=adapter.own)


def test_slices_of_unequal_ranks_and_layers_are_filled_up(model: LoadedModel, pictures: np.ndarray) -> None:
    small = taught(model, pictures, AdapterSpec(rank=1, basis="qr"), lessons=1)[0]
    part = AdapterSpec(rank=3, basis="qr", target_modules=["attn.to_q"])
    large = taught(model, pictures, part, lessons=1)[0]
    stacks = stacked([small, large], [1.0, 2.0])
    for layer, stack in stacks.items():
        deltas = stack.tensors["lora_B"] @ stack.tensors["lora_A"]
        assert torch.allclose(deltas[0], small.layers[layer].delta(), atol=1e-6)
        expected = large.layers[layer].delta() if layer in large.layers else torch.zeros_like(deltas[1])
        assert torch.allclose(deltas[1], expected, atol=1e-6)


def test_a_batch_that_cannot_be_cut_is_refused(model: LoadedModel, pictures: np.ndarray) -> None:
    adapters = taught(model, pictures, AdapterSpec(rank=1, basis="qr"))
    layers = {name: [stack] for name, stack in stacked(adapters, [1.0, 1.0]).items()}
    name = next(iter(layers))
    with (
        carrying(model.denoiser, layers, 2),
        pytest.raises(QrloraError, match="a batch of 3 cannot be cut into 2 equal slices"),
    ):
        model.denoiser.get_submodule(name)(torch.zeros(3, 1, adapters[0].layers[name].shape[1]))
    assert not isinstance(model.denoiser.get_submodule(name), ManyLinear)


def test_gradients_are_clipped_adapter_by_adapter() -> None:
    generator = torch.Generator().manual_seed(0)
    many = [nn.Parameter(torch.zeros(2, *shape)) for shape in ((3, 4), (5,))]
    alone = [[nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,))] for _ in range(2)]
    for place, parameter in enumerate(many):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad[1] *= 0.01
        for i in range(2):
            alone[i][place].grad = parameter.grad[i].clone()
    norms = clip_each(many, 1.0)
    for i in range(2):
        expected = torch.nn.utils.clip_grad_norm_(alone[i], 1.0)
        assert torch.allclose(norms[i], expected)
        for place in range(2):
            grad = many[place].grad
            assert grad is not None
            assert torch.allclose(grad[i], alone[i][place].grad, rtol=1e-5)  # pyright: ignore[reportArgumentType]


def test_a_schedule_leaves_adapters_out_by_timestep(model: LoadedModel, pictures: np.ndarray) -> None:
    one, other = (_stronger(each) for each in taught(model, pictures, AdapterSpec(rank=2, basis="lora")))
    both = ((one, 1.0), (other, 1.0))
    never = Picture("a dog", 0, both, by_timesteps([(0.0, 1000.0), (2000.0, 3000.0)]))
    free = Picture("a dog", 0, both)
    scheduled, beside = draw(model, [never, free])
    alone, summed = draw(model, [Picture("a dog", 0, ((one, 1.0),))])[0], draw(model, [free])[0]
    assert np.abs(scheduled.astype(int) - alone).max() <= 1
    assert np.abs(beside.astype(int) - summed).max() <= 1
    assert np.abs(summed.astype(int) - alone).max() > 3


def test_ranges_of_timesteps_hold_their_ends() -> None:
    factors = by_timesteps([(400, 1000), (0, 800)])
    assert [factors("any", t) for t in (1000, 800, 600, 400, 399.9)] == [[1, 0], [1, 1], [1, 1], [1, 1], [0, 1]]
