"""Trains many adapters of one kind in one batched pass a step: what `qrlora.training.train` does to each of them.

Draws, loss, clipping and optimiser are the library's; clipping and losses are taken adapter by adapter. A test holds
that the result is `train`'s own to 1e-5.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.fusion.many import Trainable, carrying, trainable
from qrlora.adapter import (
    AdapterSpec,
    BasisCache,
    adaptable_layers,
    adapter_of,
    add_adapter,
    dense_weight,
    remove_adapter,
)
from qrlora.adapter.forms import form_of
from qrlora.data import Encoded, Framing, Picture, Source, encode_examples, frame, in_looks
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank
from qrlora.models import LoadedModel, NoiseProcess
from qrlora.training import TrainConfig
from qrlora.training.objective import Draw, draw, weighted_loss
from qrlora.training.optimiser import make_optimiser

TEMPLATE = "template"
OnStep = Callable[[int], None]


@dataclass(frozen=True)
class Lesson:
    """The pictures of one adapter: uint8 `[H, W, 3]` with their captions."""

    pictures: Sequence[np.ndarray]
    captions: Sequence[str]


@dataclass(frozen=True)
class Taught:
    """One trained adapter at some step, and its losses up to there; None where it diverged."""

    adapter: Adapter | None
    losses: list[float]


def configuration(
    spec: AdapterSpec, learning_rate: float, steps: int, batch: int, seed: int, **more: Any
) -> TrainConfig:
    """The library's configuration of one run; pictures come from memory, so its two paths are only names.

    Raises:
        QrloraError: an unknown field in `more`, or a value that is not valid.
    """
    return TrainConfig.parse(
        {
            "instance_data_dir": "memory",
            "output_dir": "memory",
            "adapter": spec.model_dump(),
            "learning_rate": learning_rate,
            "max_train_steps": steps,
            "train_batch_size": batch,
            "seed": seed,
            "mixed_precision": "no",
            **more,
        }
    )


def teach(
    model: LoadedModel,
    config: TrainConfig,
    lessons: Sequence[Lesson],
    *,
    keep: Sequence[int] = (),
    cache: BasisCache | None = None,
    on_step: OnStep | None = None,
) -> dict[int, list[Taught]]:
    """Train one adapter a lesson, all of one kind and configuration.

    Args:
        model: the base, given back as it was.
        config: of every adapter.
        lessons: one an adapter.
        keep: steps at which the adapters are kept besides the last.
        cache: of bases.
        on_step: called after each step with its number.

    Returns:
        By step, one an adapter.
    """
    denoiser, process = model.denoiser, model.family.noise_process(model.pipeline)
    like, many = _start(denoiser, config.adapter, len(lessons), cache)
    encoded = [_encoded(model, lesson, config) for lesson in lessons]
    optimiser = make_optimiser(config, many.parameters)
    curves: list[Tensor] = []
    kept: dict[int, list[Taught]] = {}
    wanted = {step for step in keep if step < config.max_train_steps} | {config.max_train_steps}
    with carrying(denoiser, {name: [stack] for name, stack in many.stacks.items()}, len(lessons)):
        for step in range(config.max_train_steps):
            losses = _losses(model, process, config, encoded, step)
            losses.sum().backward()
            many.mask_gradients()
            clip_each(many.parameters, config.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            curves.append(losses.detach())
            if step + 1 in wanted:
                history = torch.stack(curves).T.tolist()
                kept[step + 1] = [Taught(_export(many, like, i), history[i]) for i in range(len(lessons))]
            if on_step is not None:
                on_step(step + 1)
    return kept


def _start(denoiser: nn.Module, spec: AdapterSpec, count: int, cache: BasisCache | None) -> tuple[Adapter, Trainable]:
    """The library's own new adapter, for its header and layers, and many copies of its start."""
    store = cache if cache is not None else BasisCache()
    names = add_adapter(denoiser, spec, TEMPLATE, cache=store)
    try:
        like = adapter_of(denoiser, TEMPLATE)
        modules, form = adaptable_layers(denoiser), form_of(spec)
        starts = {name: form.start(dense_weight(modules[name], name), spec, name, store) for name in names}
    finally:
        remove_adapter(denoiser, TEMPLATE)
    assert like.header is not None
    return like, trainable(form, form.side(spec) or _frozen_side(spec, form.name), spec.scale, spec.mask, starts, count)


def _frozen_side(spec: AdapterSpec, form: str) -> Any:
    """The side by which `Form.frozen` is asked where the header has none."""
    return None if form in ("lora", "dora", "both") else spec.side


def _encoded(model: LoadedModel, lesson: Lesson, config: TrainConfig) -> Encoded:
    sources = [_source(picture, caption) for picture, caption in zip(lesson.pictures, lesson.captions, strict=True)]
    height, width = lesson.pictures[0].shape[:2]
    encoded = encode_examples(
        frame(in_looks(sources, config.looks), Framing(((height, width),))),
        model.family,
        model.pipeline,
        max_sequence_length=model.defaults.max_sequence_length,
        random_flip=config.random_flip,
    )
    return encoded.to(model.denoiser.dtype)


def _source(picture: np.ndarray, caption: str) -> Source:
    return Source("memory", caption, lambda: Picture(Image.fromarray(picture), None))


def _losses(
    model: LoadedModel, process: NoiseProcess, config: TrainConfig, encoded: Sequence[Encoded], step: int
) -> Tensor:
    """The loss of each adapter `[N]`."""
    drawn: dict[tuple[int, ...], Draw] = {}
    for each in encoded:  # a draw depends on how many pictures there are, and on nothing else of them
        if each.counts not in drawn:
            drawn[each.counts] = draw(config, each, process, step, 0)
    draws = [drawn[each.counts] for each in encoded]
    clean = torch.cat([each.groups[one.group].latents[one.rows] for each, one in zip(encoded, draws, strict=True)])
    conditioning: Mapping[str, Tensor] = {
        key: torch.cat([each.conditioning[key][one.captions] for each, one in zip(encoded, draws, strict=True)])
        for key in encoded[0].conditioning
    }
    noise = torch.cat([one.noise for one in draws])
    index = torch.cat([one.index for one in draws])
    levels = process.levels.to(clean.device)[index]
    noisy = process.noisy(clean, noise, index)
    predicted = model.family.predict(model.denoiser, noisy, levels, conditioning, config.guidance_scale)
    target = process.target(clean, noise, index)
    size = config.train_batch_size
    pairs = zip(predicted.split(size), target.split(size), draws, strict=True)
    return torch.stack([weighted_loss(a, b, None, one.weighting) for a, b, one in pairs])


def clip_each(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """`clip_grad_norm_` for every adapter by itself; returns the norms `[N]`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise QrloraError("nothing is trained: no parameter has a gradient.")
    norms = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients]).sum(dim=0).sqrt()
    factors = (limit / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.reshape(-1, *(1 for _ in gradient.shape[1:])))
    return norms


def _export(many: Trainable, like: Adapter, index: int) -> Adapter | None:
    """Adapter `index` as the library would have it from its denoiser; None where it is not finite."""
    form = next(iter(many.stacks.values())).form
    layers: dict[str, LowRank] = {}
    own: dict[str, dict[str, Tensor]] = {}
    for name in many.stacks:
        saved = form.export(many.held(name, index))
        pair = LowRank(saved.pair.B.clone(), saved.pair.A.clone())
        if not all(bool(torch.isfinite(t).all()) for t in (pair.A, pair.B, *saved.own.values())):
            return None
        layers[name] = pair
        if saved.own:
            own[name] = {key: tensor.clone() for key, tensor in saved.own.items()}
    return Adapter(layers, like.header, like.component, own=own)
