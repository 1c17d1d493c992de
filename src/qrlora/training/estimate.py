"""How much memory a training will take, from configurations alone: nothing is loaded and no weight has a value."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from qrlora.adapter import add_blank_adapter, set_adapters, trainable_parameters
from qrlora.errors import QrloraError
from qrlora.models import BlockStream, Blueprint
from qrlora.training._trace import Meter, make_fake, pack, size_of, widen_norms, without_numbers
from qrlora.training.config import Memory, TrainConfig
from qrlora.training.memory import GIB, preset
from qrlora.training.objective import weighted_loss

CONTEXT_BYTES = 600 * 2**20
"""What a process takes of a GPU before its first tensor (context, kernels) and cuBLAS keeps as workspace: about 0.6 GiB
on current drivers. It differs by driver and card and is added to every phase on a GPU."""
_NAME = "estimated"
_EIGHT_BIT_LEAST, _EIGHT_BIT_BLOCK = 4096, 256  # bitsandbytes': smaller tensors stay fp32; a scale for each block


@dataclass(frozen=True)
class Phase:
    """One phase of a run: what it holds, in bytes, by what it is; in the order it comes to be."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the phase's peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """Estimated peak of a run on its device.

    Attributes:
        model: what the model is called.
        config: the settings, with presets and defaults filled in.
        layers: how many are adapted.
        trained: how many numbers are trained, without masked ones.
        phases: encoding, then training.
        host: bytes of streamed blocks in the CPU's memory.
        context: bytes that the device's context takes beside tensors; 0 on a CPU.
    """

    model: str
    config: TrainConfig
    layers: int
    trained: int
    phases: tuple[Phase, ...]
    host: int
    context: int

    @property
    def largest(self) -> Phase:
        """The phase that decides."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of the largest phase, with the context."""
        return self.largest.total + self.context

    def fits(self, gib: float) -> bool:
        """Whether a card of so many GiB is enough, with nothing else on it."""
        return self.peak <= gib * 2**30


def resolve(config: TrainConfig, blueprint: Blueprint) -> TrainConfig:
    """The configuration as `train` would resolve it, presets included, for a GPU where no device is named."""
    denoiser = blueprint.denoiser
    memory = config.with_defaults(blueprint.training).memory
    chosen = {} if memory is None else preset(memory, denoiser)
    config = config.with_defaults({**blueprint.training, **chosen})
    on_cpu = config.device is not None and torch.device(config.device).type == "cpu"
    resolution = config.resolution or _settings_of(blueprint)["height"]
    return config.model_copy(
        update={
            "mixed_precision": config.mixed_precision or ("no" if on_cpu else "bf16"),
            "resolution": resolution,
            "device": config.device or "cuda",
        }
    )


def estimate(config: TrainConfig, blueprint: Blueprint) -> Estimate:
    """The peak of a run, phase by phase, from a training step on tensors without values.

    Captions are counted as long as `max_sequence_length` lets them be, also where shorter ones take less.
    Left out are the time the bases are computed the first time (less than a training step takes, except with `offload:
    blocks`, where it is the CPU's memory), pictures made while training, and fragmentation.

    Args:
        config: the run; pictures and captions are not looked at.
        blueprint: the model's configurations.

    Raises:
        QrloraError: what a training would refuse of the model and the adapter, or an adapter whose size is not known
            beforehand.
    """
    config = resolve(config, blueprint)
    if config.train_text_encoder:
        raise QrloraError(
            "what trained text encoders take is not estimated; leave train_text_encoder out, and add their weights, "
            "adapters and activations (CLIP-L alone: about 0.5 GiB)."
        )
    training, layers, trained, host = _training(config, blueprint)
    phases = (_encoding(config, blueprint), training)
    context = 0 if torch.device(config.device or "cuda").type == "cpu" else CONTEXT_BYTES
    return Estimate(blueprint.model_id, config, layers, trained, phases, host, context)


def fitting_memory(config: TrainConfig, blueprint: Blueprint, gib: float) -> tuple[Memory, Estimate] | None:
    """The `memory` that costs least time and fits a card of so many GiB, with its estimate; None if none does."""
    given = {name: getattr(config, name) for name in config.model_fields_set}
    tried: list[dict[str, Any]] = []
    for memory in reversed(get_args(Memory)):
        settings, size = preset(memory, blueprint.denoiser), GIB[memory]
        too_large = size is not None and size > gib + 1  # a card of 24 GB may have 23.5 GiB
        if settings in tried or (too_large and memory != "6gb"):
            continue
        tried.append(settings)
        found = estimate(TrainConfig.parse(given | {"memory": memory}), blueprint)
        if found.fits(gib):
            return memory, found
    return None


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def _training(config: TrainConfig, blueprint: Blueprint) -> tuple[Phase, int, int, int]:
    """The phase, adapted layers, trained numbers, and bytes of streamed blocks on the CPU."""
    denoiser: Any = blueprint.denoiser
    if config.quantization is not None:
        pack(denoiser, config.quantization, _dtype(config))
    trained = add_blank_adapter(denoiser, config.adapter, _NAME)
    with without_numbers():
        make_fake(denoiser, _dtype(config))
        if torch.device(config.device or "cuda").type != "cpu":
            widen_norms(denoiser)
        set_adapters(denoiser, {_NAME: 1.0})
        parameters = list(trainable_parameters(denoiser, _NAME).values())
        stream = BlockStream(denoiser, torch.device("cpu")) if config.offload == "blocks" else None
        if config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            if stream is not None:
                stream.take_over_checkpointing()
        states = _states(config, parameters)
        host, rooms = ([], []) if stream is None else (stream.host_tensors, stream.device_tensors)
        named = [*denoiser.named_parameters(), *denoiser.named_buffers()]
        sizes = {
            "weights": size_of([tensor for name, tensor in named if "lora_" not in name], but=host),
            "rooms for streamed blocks": size_of(rooms),
            "frozen bases": size_of([tensor for name, tensor in named if "lora_" in name], but=parameters),
            "coefficients": size_of(parameters),
            "optimiser states": size_of(states),
        }
        meter = Meter([*(tensor for _, tensor in named), *rooms, *states], ignored=host)
        kept, peak = _step(config, blueprint, denoiser, parameters, meter)
        sizes["activations kept for the backward pass"] = kept - sum(sizes.values())
        sizes["gradients and the backward pass"] = peak - kept
        return Phase("training", sizes), len(trained), sum(trained.values()), size_of(host)


def _states(config: TrainConfig, parameters: Iterable[Tensor]) -> list[Tensor]:
    """What the optimiser keeps of every parameter, and the moving average."""
    found: list[Tensor] = []
    for parameter in parameters:
        if config.use_8bit_adam and parameter.numel() >= _EIGHT_BIT_LEAST:
            found.append(torch.empty(2 * parameter.numel(), dtype=torch.uint8))
            found.append(torch.empty(-(-parameter.numel() // _EIGHT_BIT_BLOCK) * 2))
        else:
            # AdamW: two moments; Prodigy: also where it started and the sum of its steps.
            found += [torch.empty_like(parameter) for _ in range(4 if config.optimizer == "prodigy" else 2)]
        if config.use_ema:
            found.append(torch.empty_like(parameter))
    return found


def _step(
    config: TrainConfig, blueprint: Blueprint, denoiser: nn.Module, parameters: list[nn.Parameter], meter: Meter
) -> tuple[int, int]:
    """Bytes at the end of a forward pass and at the peak of a step that is not the first."""
    family, dtype = blueprint.family, _dtype(config)
    assert config.resolution is not None
    side = config.resolution // blueprint.vae_scale_factor
    rows = config.train_batch_size
    length = _settings_of(blueprint)["max_sequence_length"]
    shapes = family.conditioning_shapes(denoiser, length)
    autocast = config.mixed_precision == "bf16"
    with meter, disable_input_dtype_casting(denoiser, active=autocast):
        conditioning = {name: torch.empty(rows, *shape, dtype=dtype) for name, shape in shapes.items()}
        levels = torch.empty(rows)
        clean = torch.empty(rows, family.latent_channels(denoiser), side, side)
        if config.gradient_accumulation_steps > 1 or config.with_prior_preservation:
            # gradients are there before the last forward pass; class pictures have a pass of their own
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
        noise = torch.empty_like(clean)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            noisy = torch.lerp(clean, noise, levels[:, None, None, None])
            predicted = family.predict(denoiser, noisy, levels, conditioning, config.guidance_scale)
            loss = weighted_loss(predicted, noise - clean, None, None)
        kept = meter.now
        loss.backward()
    return kept, meter.peak


def _encoding(config: TrainConfig, blueprint: Blueprint) -> Phase:
    """Text encoders and autoencoder together on the device, and what the hungriest of them needs for its work."""
    family, dtype = blueprint.family, _dtype(config)
    assert config.resolution is not None
    long = _settings_of(blueprint)["max_sequence_length"]
    with without_numbers(), torch.no_grad():
        modules: dict[str, Any] = {name: blueprint.build(name) for name in blueprint.components}
        del modules[family.component]
        sizes = {"text encoders": 0, "rooms for streamed blocks": 0, "autoencoder": 0}
        needs = 0
        for name, module in modules.items():
            text = name in family.text_components
            # In fp32 where the autoencoder asks for it, as `Family.encode_pictures` has it.
            upcast = name == "vae" and module.config.get("force_upcast", False)
            make_fake(module, torch.float32 if upcast else dtype)
            stream = BlockStream(module, torch.device("cpu")) if text and config.encoder_offload == "blocks" else None
            host, rooms = ([], []) if stream is None else (stream.host_tensors, stream.device_tensors)
            tensors = [*module.parameters(), *module.buffers()]
            sizes["text encoders" if text else "autoencoder"] += size_of(tensors, but=host)
            sizes["rooms for streamed blocks"] += size_of(rooms)
            meter = Meter([*tensors, *rooms], ignored=host)
            before = meter.now
            with meter:
                if text:
                    clip = module.config.model_type == "clip_text_model"  # always reads all that it can
                    length = module.config.max_position_embeddings if clip else long
                    module(torch.empty(1, length, dtype=torch.int64), output_hidden_states=True)
                elif name == "vae":
                    pixels = torch.empty(1, 3, config.resolution, config.resolution, dtype=module.dtype)
                    module.encode(family.autoencoder_input(pixels))
            needs = max(needs, meter.peak - before)
        sizes["activations"] = needs
        return Phase("encoding", sizes)


def _settings_of(blueprint: Blueprint) -> dict[str, Any]:
    return blueprint.family.generation_defaults.model_dump() | blueprint.settings.generation
