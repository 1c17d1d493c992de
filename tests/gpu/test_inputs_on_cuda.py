"""Batches come from the computer's memory, whatever computes on them."""

from pathlib import Path

import pytest
import torch

from qrlora.data import encode_examples, load_examples
from qrlora.models import load_pipeline
from qrlora.training import TrainConfig
from qrlora.training.objective import draw, loss_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]


def test_a_loss_on_cuda_is_that_on_the_cpu(tiny_flux: Path) -> None:
    from qrlora import starter

    model = load_pipeline(tiny_flux)
    examples = load_examples(starter.samples().content, "a <c>", 32)
    process = model.family.noise_process(model.pipeline)
    config = TrainConfig.parse({"instance_data_dir": "x", "output_dir": "y", "train_batch_size": 4})
    losses: list[float] = []
    for device in ("cpu", "cuda"):
        model.pipeline.to(device)
        encoded = encode_examples(examples, model.family, model.pipeline, max_sequence_length=16)
        assert {group.latents.device.type for group in encoded.groups} == {"cpu"}
        drawn = draw(config, encoded, process, 0, 0)
        with torch.no_grad():
            losses.append(float(loss_of(model.family, model.denoiser, encoded, drawn, process, 1.0, device)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
