"""Streamed blocks and estimates on the device they are for; the CPU tests hold everything else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image

from qrlora.adapter import trainable_parameters
from qrlora.models import BlockStream, load_pipeline, read_blueprint
from qrlora.training import TrainConfig, estimate, train
from qrlora.training.run import Run
from tests.models.test_streaming import KINDS, adapted
from tests.tiny_models import inputs, output, run
from tests.tiny_pipelines import flux_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the packages warn of missing kernels and deprecations of their own
]
MIB = 2**20


def on_cuda(kind: str) -> dict[str, torch.Tensor]:
    return {key: value.cuda() for key, value in inputs(kind).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_blocks_compute_what_the_whole_model_does(kind: str) -> None:
    expected, model = adapted(kind).cuda(), adapted(kind)
    stream = BlockStream(model, torch.device("cuda", torch.cuda.current_device()))
    for _ in range(3):
        assert torch.equal(output(model, on_cuda(kind)), output(expected, on_cuda(kind)))
        found = []
        for each in (model, expected):
            run(each, on_cuda(kind)).square().mean().backward()
            parameters = trainable_parameters(each, "content")
            assert all(parameter.is_cuda for parameter in parameters.values())
            found.append({name: parameter.grad.cpu() for name, parameter in parameters.items()})
            for parameter in parameters.values():
                parameter.grad = None
        for name in found[0]:
            torch.testing.assert_close(found[0][name], found[1][name])
    assert all(not block.is_cuda for block in stream.host_tensors)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX of 0.4 billion parameters: large enough that what it takes is seen beside the allocator's rounding."""
    folder = tmp_path_factory.mktemp("models") / "large"
    pipeline = flux_pipeline(guidance_embeds=True)
    with torch.device("cuda"):
        pipeline.transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=4,
            num_single_layers=8,
            attention_head_dim=128,
            num_attention_heads=10,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
        ).to("cpu", torch.bfloat16)
    pipeline.save_pretrained(folder)
    (folder / "qrlora.json").write_text(json.dumps({"generation": {"max_sequence_length": 128}}))
    return folder


@pytest.mark.parametrize(
    "more",
    [
        {"gradient_checkpointing": True},
        {},
        {"quantization": "nf4", "gradient_checkpointing": True},
        {"quantization": "int8", "gradient_checkpointing": True},
        {"offload": "blocks"},
        {"quantization": "nf4", "offload": "blocks"},
        {"quantization": "int8", "offload": "blocks"},
    ],
)
def test_a_training_step_takes_what_was_estimated(
    more: dict[str, Any], large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)).save(tmp_path / "a.png")
    config = TrainConfig.parse(
        {
            "model": str(large),
            "instance_data_dir": str(tmp_path / "a.png"),
            "instance_prompt": "a dog",
            "output_dir": str(tmp_path / "out"),
            "resolution": 256,
            "train_batch_size": 4,
            "max_train_steps": 3,
            "device": "cuda",
        }
        | more
    )
    peaks: list[int] = []
    original = Run.train_step

    def train_step(self: Run) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        original(self)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())

    monkeypatch.setattr(Run, "train_step", train_step)
    train(config, progress=False)
    found = estimate(config, read_blueprint(large)).phases[1].total
    assert 0.85 < found / peaks[-1] < 1.15, (found / MIB, peaks[-1] / MIB)


def test_pictures_and_encoders_on_a_small_card_are_those_of_a_large_one(large: Path) -> None:
    def picture(**more: Any) -> np.ndarray:
        model = load_pipeline(large, dtype=torch.bfloat16, device="cuda", **more)
        settings = model.defaults.model_dump() | {"height": 64, "width": 64, "num_inference_steps": 2}
        return np.asarray(model.family.generate(model.pipeline, ["a cat"], seeds=[1], **settings)[0])

    np.testing.assert_array_equal(picture(), picture(offload="blocks", encoder_offload="blocks"))
