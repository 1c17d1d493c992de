"""Adapters as data, with the layers' names and shapes of real denoisers, and files as other tools write them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from qrlora.formats import Adapter, LowRank
from tests.tiny_models import tiny_flux, tiny_sd3
from tests.tiny_newer import flux2_transformer, qwen_image_transformer, sd15_unet, z_image_transformer

RELATIVE = 1e-6


def tiny_sdxl(seed: int = 0) -> UNet2DConditionModel:
    """SDXL's three levels of two residual blocks, attention on the lower two, as narrow as can be."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 2, 2),
        cross_attention_dim=12,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    ).eval()


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "flux": tiny_flux,
    "sd3": tiny_sd3,
    "sdxl": tiny_sdxl,
    "sd15": lambda: sd15_unet(resnets=2),
    "flux2": lambda: flux2_transformer(guidance_embeds=True),
    "qwen-image": qwen_image_transformer,
    "z-image": z_image_transformer,
}


def adaptable(kind: str) -> dict[str, tuple[int, ...]]:
    """Every Linear and Conv2d of the tiny model, by path, and the shape of its weight."""
    modules = MODELS[kind]().named_modules()
    return {name: tuple(each.weight.shape) for name, each in modules if isinstance(each, nn.Linear | nn.Conv2d)}


def random_pair(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> LowRank:
    ones = (1,) * (len(shape) - 2)
    B = torch.randn(shape[0], rank, *ones, generator=generator)
    return LowRank(B, torch.randn(rank, *shape[1:], generator=generator))


def real_adapter(kind: str, *ends: str, rank: int = 2, seed: int = 0) -> Adapter:
    """Random factors on every layer whose path ends in one of `ends`; on all of them without `ends`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {path: shape for path, shape in adaptable(kind).items() if not ends or path.endswith(ends)}
    layers = {path: random_pair(shape, rank, generator) for path, shape in shapes.items()}
    return Adapter(layers, None, "unet" if kind in ("sdxl", "sd15") else "transformer")


def dense64(pair: LowRank) -> Tensor:
    return pair.B.double().flatten(1) @ pair.A.double().flatten(1)


def assert_same_updates(got: Adapter, expected: Mapping[str, LowRank] | Mapping[str, Tensor]) -> None:
    """The same layers, each with the same dense `dW`, worked out here in float64."""
    assert set(got.layers) == set(expected)
    for path, wanted in expected.items():
        target = dense64(wanted) if isinstance(wanted, LowRank) else wanted.double()
        assert float((dense64(got.layers[path]) - target).norm()) <= RELATIVE * float(target.norm()), path


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """With the library's own writer."""
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path
