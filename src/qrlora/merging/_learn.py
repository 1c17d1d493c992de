"""Mergers learned on the base model: the joined adapters are to do on each adapter's pictures what it does alone."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrlora.adapter import adapters_set_aside, attach_adapter, remove_adapter, trainable_parameters
from qrlora.data import Encoded, Example, Framing, Picture, Source, encode_examples, frame
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, Component, Header
from qrlora.merging._mergers import Joined, Overlap, overlap
from qrlora.models import LoadedModel, NoiseProcess

ADAPTER_NAME = "merging"
DRAWING_STEPS = 10
"""Enough for what is looked at by the denoiser alone."""
TAUGHT_AT_ONCE = 8
"""Pictures of an adapter of which it says at once, without gradients, what the merge is to say in the steps to come."""
Progress = Callable[[int, int, float], object]
"""Steps done, steps in all, the last step's loss."""


@dataclass(frozen=True)
class Learning:
    """How mergers are learned; see `merge_zip`."""

    steps: int
    learning_rate: float
    weight_decay: float
    strength: float
    penalty: Overlap
    train_batch_size: int
    guidance_scale: float
    seed: int


@dataclass(frozen=True)
class Batch:
    """One step's draw: rows of the pictures `[adapters, B]`, levels `[B]` and noise `[B, C, h, w]` for all of them."""

    rows: Tensor
    index: Tensor
    noise: Tensor


class OneAdapter:
    """An adapter on a model of which the A are set: any of the joined adapters alone, or all of them."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters

    def put(self, rows: Sequence[Tensor]) -> None:
        """Take these for A, `[r, n]` a layer."""
        with torch.no_grad():
            for parameter, own in zip(self.parameters, rows, strict=True):
                parameter.copy_(own.reshape(parameter.shape))


@contextmanager
def on_model(
    model: LoadedModel, joined: Joined, component: Component, hashes: Mapping[str, str]
) -> Generator[OneAdapter]:
    """Within this context the model has the joined adapters as one, and no other acts; afterwards it is as it was.

    Raises:
        QrloraError: adapters of another base model.
    """
    # B stands still, as a basis does, whatever it is.
    header = Header(basis="joined", side="output", rank=joined.rank, weight_hashes=dict(hashes))
    whole = Adapter(joined.layers(joined.alone(0)), header, component, source="the merge")
    denoiser = model.denoiser
    with adapters_set_aside(model.pipeline):
        attach_adapter(denoiser, whole, ADAPTER_NAME, trainable=True)
        try:
            model.settle()
            trained = trainable_parameters(denoiser, ADAPTER_NAME)
            yield OneAdapter([trained[f"{name}.lora_A.weight"] for name in joined.rows])
        finally:
            remove_adapter(denoiser, ADAPTER_NAME)


def drawn_pictures(
    model: LoadedModel,
    adapter: OneAdapter,
    joined: Joined,
    captions: Sequence[Sequence[str]],
    *,
    count: int,
    num_inference_steps: int | None,
    seed: int,
) -> Encoded:
    """Pictures that each adapter draws of its own captions, as the model's own latents and embeddings.

    Args:
        model: with its encoders.
        adapter: on the model.
        joined: what it may be.
        captions: of each adapter, taken in turn.
        count: pictures of each; picture `k` of adapter `i` is row `i * count + k`.
        num_inference_steps: of a picture; the model's own, at most `DRAWING_STEPS`, where None.
        seed: of the first picture; each has the next.
    """
    family, settings = model.family, model.defaults
    side = int(model.training.get("resolution", settings.height))
    steps = num_inference_steps or min(DRAWING_STEPS, settings.num_inference_steps)
    settings = settings.model_copy(update={"height": side, "width": side, "num_inference_steps": steps})
    examples: list[Example] = []
    for index, own in enumerate(captions):
        adapter.put(joined.alone(index))
        prompts = [own[number % len(own)] for number in range(count)]
        pictures = family.generate(
            model.pipeline,
            prompts,
            seeds=[seed + index * count + number for number in range(count)],
            batch_size=count,
            **settings.model_dump(),
        )
        sources = [
            Source(f"picture {number}", prompt, lambda image=image: Picture(image.convert("RGB"), None))
            for number, (prompt, image) in enumerate(zip(prompts, pictures, strict=True))
        ]
        examples += frame(sources, Framing(((side, side),)))
    return encode_examples(examples, family, model.pipeline, max_sequence_length=settings.max_sequence_length)


def batch_at(encoded: Encoded, process: NoiseProcess, adapters: int, how: Learning, step: int) -> Batch:
    """What is drawn at a step, a function of the seed and the step alone."""
    generator = torch.Generator().manual_seed((how.seed * 1_000_003 + step) % 2**63)
    group, size = encoded.groups[0], how.train_batch_size
    count = group.count // adapters
    rows = torch.randint(count, (adapters, size), generator=generator) + count * torch.arange(adapters)[:, None]
    index = torch.randint(len(process), (size,), generator=generator)
    return Batch(rows, index, torch.randn(size, *group.latents.shape[1:], generator=generator))


def learn(
    model: LoadedModel,
    adapter: OneAdapter,
    joined: Joined,
    encoded: Encoded,
    how: Learning,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Mergers `[adapters, n]` of each layer, in float64 on the CPU.

    The loss of a step is `sum_i MSE(joined(x_i), adapter_i(x_i)) + strength * overlap`, by AdamW from 1.

    Raises:
        QrloraError: they did not stay finite.
    """
    process, device = model.family.noise_process(model.pipeline), model.device
    adapters, joined = len(next(iter(joined.rows.values()))), joined.to(device)
    alone = [joined.alone(index) for index in range(adapters)]
    mergers = nn.Parameter(torch.ones(adapters, sum(joined.widths), device=device))
    optimiser = torch.optim.AdamW([mergers], lr=how.learning_rate, weight_decay=how.weight_decay)
    # Asking the model for its device or precision at every step costs milliseconds.
    predicted = partial(_predicted, model, encoded.to(model.denoiser.dtype), process, how.guidance_scale, device)
    ahead = max(1, TAUGHT_AT_ONCE // how.train_batch_size)
    done = 0
    while done < how.steps:
        steps = range(done, min(done + ahead, how.steps))
        batches = [batch_at(encoded, process, adapters, how, step) for step in steps]
        for batch, wanted in zip(batches, _taught(adapter, alone, batches, predicted), strict=True):
            optimiser.zero_grad()
            built = joined.merged(_by_layer(mergers, joined.widths))
            adapter.put(built)
            index, noise = batch.index.repeat(adapters), batch.noise.repeat(adapters, 1, 1, 1)
            distance = adapters * F.mse_loss(predicted(batch.rows.flatten(), index, noise).float(), wanted)
            gradients = torch.autograd.grad(distance, adapter.parameters)
            shared = how.strength * overlap(mergers, joined.widths, how.penalty)
            # From the factors on the model to what they are made of.
            slopes = [gradient.reshape(own.shape) for gradient, own in zip(gradients, built, strict=True)]
            torch.autograd.backward([shared, *built], [torch.ones_like(shared), *slopes])
            cast(Any, optimiser).step()
            done += 1
            if progress is not None:
                progress(done, how.steps, float((distance + shared).detach()))
    if not bool(torch.isfinite(mergers).all()):
        raise QrloraError(
            "the mergers did not stay finite; give a lower learning_rate, or a base model in fp32 or bf16."
        )
    return [each.double() for each in _by_layer(mergers.detach().cpu(), joined.widths)]


def _by_layer(mergers: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    return cast(tuple[Tensor, ...], cast(Any, mergers).split(widths, dim=1))


def _taught(
    adapter: OneAdapter, alone: Sequence[Sequence[Tensor]], batches: Sequence[Batch], predicted: Callable[..., Tensor]
) -> list[Tensor]:
    """What each adapter alone says of its pictures, `[adapters * B, C, h, w]` for each of some batches, at once."""
    index, noise = torch.cat([batch.index for batch in batches]), torch.cat([batch.noise for batch in batches])
    said: list[Tensor] = []
    with torch.no_grad():
        for place, own in enumerate(alone):
            adapter.put(own)
            said.append(predicted(torch.cat([batch.rows[place] for batch in batches]), index, noise).float())
    picture = said[0].shape[1:]
    by_batch = torch.stack(said).reshape(len(alone), len(batches), -1, *picture).transpose(0, 1)
    return list(by_batch.reshape(len(batches), -1, *picture).unbind())


def _predicted(
    model: LoadedModel,
    encoded: Encoded,
    process: NoiseProcess,
    guidance: float,
    device: torch.device,
    rows: Tensor,
    index: Tensor,
    noise: Tensor,
) -> Tensor:
    """What the denoiser says of some pictures, each at its level and noise."""
    group = encoded.groups[0]
    noisy = process.noisy(group.latents[rows], noise, index)
    captions = group.caption_rows[rows]
    conditioning = {key: value[captions].to(device) for key, value in encoded.conditioning.items()}
    conditioning |= {key: value[rows].to(device) for key, value in group.picture_conditioning.items()}
    levels = process.levels[index].to(device)
    return model.family.predict(model.denoiser, noisy.to(device), levels, conditioning, guidance)
