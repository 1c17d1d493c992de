"""FLUX.1-dev's layers as shapes, adapters of its size, and FLUX models of the true class with random weights."""

from functools import cache
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from benchmarks.performance._measure import CPU
from qrlora.adapter import adaptable_layers, target_layers
from qrlora.formats import Adapter, Header, LowRank
from qrlora.models import read_blueprint

RANK = 64


@cache
def layer_shapes(model: str = "flux-dev") -> dict[str, tuple[int, int]]:
    """`(out, in)` of every layer that is adapted by default, in the order of the model."""
    denoiser = read_blueprint(model).denoiser
    modules = adaptable_layers(denoiser)
    return {name: tuple(_weight(modules[name]).shape) for name in target_layers(denoiser, "auto")}


def _weight(module: nn.Module) -> Any:
    return module.weight


def distinct_shapes(shapes: dict[str, tuple[int, int]]) -> dict[tuple[int, int], int]:
    """How many layers there are of each shape."""
    found: dict[tuple[int, int], int] = {}
    for shape in shapes.values():
        found[shape] = found.get(shape, 0) + 1
    return found


def adapter_of_size(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Adapter:
    """An adapter with these layers; the same basis whatever `seed`, so that any two can be summed."""
    bases, trained = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    known: dict[int, Tensor] = {}
    layers: dict[str, LowRank] = {}
    for name, (out, inputs) in shapes.items():
        if out not in known:
            known[out] = torch.linalg.qr(torch.randn(out, rank, generator=bases)).Q
        A = 1e-3 * torch.randn(rank, inputs, generator=trained)
        layers[name] = LowRank(known[out].clone(), A)
    header = Header(basis="qr", side="output", mask="full", rank=rank, lora_alpha=rank)
    return Adapter(layers, header)


def flux_model(
    width: int, doubles: int, singles: int, dtype: torch.dtype, device: torch.device = CPU, *, like: Any = None
) -> Any:
    """A small FLUX with heads of 64, frozen, random.

    Args:
        width: of the model, a multiple of 64.
        doubles: double blocks.
        singles: single blocks.
        dtype: of its weights.
        device: where they are.
        like: a configuration that gives the sizes of inputs; the embedded base's sizes where None.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = (
        {"in_channels": 64, "joint_attention_dim": 192, "pooled_projection_dim": 128} if like is None else like
    )
    with torch.device(device):
        model: Any = FluxTransformer2DModel(
            **sizes,
            num_layers=doubles,
            num_single_layers=singles,
            attention_head_dim=64,
            num_attention_heads=width // 64,
            axes_dims_rope=(16, 24, 24),
        )
    return model.to(dtype).requires_grad_(False).eval()


def flux_inputs(model: Any, picture: int, batch: int, words: int = 32) -> dict[str, Tensor]:
    """What one forward pass needs, for square pictures of so many pixels: `(picture / 16)^2` tokens and `words`."""
    side, generator = picture // 16, torch.Generator().manual_seed(1)
    config, dtype, device = model.config, model.dtype, model.device
    rows, columns = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    places = torch.stack([torch.zeros(side * side), rows.flatten(), columns.flatten()], dim=1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    given = {
        "hidden_states": random(batch, side * side, config.in_channels),
        "encoder_hidden_states": random(batch, words, config.joint_attention_dim),
        "pooled_projections": random(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_ids": places.to(device, dtype),
        "txt_ids": torch.zeros(words, 3, device=device, dtype=dtype),
    }
    if config.guidance_embeds:
        given["guidance"] = torch.ones(batch, device=device, dtype=dtype)
    return given
