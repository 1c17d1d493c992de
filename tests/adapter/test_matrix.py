"""Every basis, side, mask and form on every kind of layer and dtype: start, training, files, stock loader, merge.

The models are shared: an adapter is put on, used and taken off again, which has to leave them as they were.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from qrlora.adapter import (
    AdapterSpec,
    BasisCache,
    adapter_of,
    adapters_disabled,
    add_adapter,
    remove_adapter,
    trainable_parameters,
)
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, read_adapter
from qrlora.merging import merge
from tests.adapters_of_data import dense, relative
from tests.tiny_models import flux_inputs, run, sd3_inputs, tiny_flux, tiny_sd3, unet_inputs

# The models are random: there are no independent components, so whether FastICA converges is up to rounding.
pytestmark = pytest.mark.filterwarnings("ignore:.*FastICA did not converge")

# Together they have square, tall and wide Linear layers, and 3 x 3, strided and 1 x 1 convolutions.
TARGETS: Mapping[str, list[str]] = {
    "flux": ["attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.net.0.proj", "ff.net.2"],
    "sd3": ["attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_v_proj", "attn.to_add_out"],
    "sdxl": ["attn1.to_q", "attn2.to_k", "attn2.to_out.0", "conv1", "conv_shortcut", "downsamplers.0.conv"],
}
PREFIXES: Mapping[str, str] = {"flux": "transformer", "sd3": "transformer", "sdxl": "unet"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _sdxl() -> nn.Module:
    """As Stable Diffusion XL's: linear projections, and pooled text and sizes added to the time embedding."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


@dataclass(frozen=True)
class Shared:
    """A model of ours, one that stock diffusers loads into, their inputs, and what the base gives."""

    ours: Any
    stock: Any
    given: dict[str, Any]
    base: Tensor


@cache
def shared(kind: str, dtype: str) -> Shared:
    makers = {"flux": lambda: tiny_flux(blocks=1), "sd3": tiny_sd3, "sdxl": _sdxl}
    given: dict[str, Any] = {"flux": flux_inputs, "sd3": sd3_inputs, "sdxl": unet_inputs}[kind]()
    if kind == "sdxl":
        text = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.ones(2, 6)}
    models: list[Any] = [makers[kind]().to(DTYPES[dtype]).eval().requires_grad_(False) for _ in range(2)]
    return Shared(models[0], models[1], given, _output(models[0], given))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> BasisCache:
    """On disk for the whole module: masks share their bases."""
    return BasisCache(tmp_path_factory.mktemp("bases"))


def _output(denoiser: Any, given: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return _run(denoiser, given)


def _run(denoiser: Any, given: Mapping[str, Any]) -> Tensor:
    plain = {key: value for key, value in given.items() if key != "added_cond_kwargs"}
    if len(plain) == len(given):
        return run(denoiser, plain)
    cast = {key: value.to(denoiser.dtype) if key != "timestep" else value for key, value in plain.items()}
    return denoiser(**cast, added_cond_kwargs=given["added_cond_kwargs"], return_dict=False)[0]


COEFFICIENTS = {
    f"{basis}-{side}-{mask}": {"basis": basis, "side": side, "mask": mask}
    for basis in ("qr", "svd", "minor", "random", "ica")
    for side in ("output", "input")
    for mask in ("upper", "full")
}
OTHERS: dict[str, dict[str, Any]] = {
    "lora": {"basis": "lora"},
    "dora": {"basis": "dora"},
    "pissa": {"basis": "pissa", "lora_alpha": 2.0},
    "olora": {"basis": "olora"},
    "both": {"form": "both"},
    "both-input": {"form": "both", "side": "input", "lora_alpha": 2.0},
    "core": {"form": "core", "basis": "svd"},
    "core-random-input": {"form": "core", "basis": "random", "side": "input", "lora_alpha": 2.0},
    "band": {"band": "1/2"},
}
SPECS = COEFFICIENTS | OTHERS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", TARGETS)
def test_from_the_start_to_a_merge(kind: str, name: str, dtype: str, tmp_path: Path, bases: BasisCache) -> None:
    model = shared(kind, dtype)
    spec = AdapterSpec(rank=2, target_modules=TARGETS[kind], **SPECS[name])
    add_adapter(model.ours, spec, "content", cache=bases)
    try:
        assert torch.equal(_output(model.ours, model.given), model.base)
        parts = _trained(model, spec)
        adapted = _output(model.ours, model.given)
        assert not torch.equal(adapted, model.base)
        with adapters_disabled(model.ours):
            assert torch.equal(_output(model.ours, model.given), model.base)
    finally:
        remove_adapter(model.ours, "content")
    assert torch.equal(_output(model.ours, model.given), model.base)
    _check_reloaded(kind, dtype, model, parts[1].save(tmp_path / "adapter.safetensors"), adapted)
    _check_merged(parts, name)


def _trained(model: Shared, spec: AdapterSpec) -> list[Adapter]:
    """The adapter after two and after three steps of AdamW with weight decay: two adapters of one basis."""
    parameters = trainable_parameters(model.ours, "content")
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
    parts: list[Adapter] = []
    for step in range(3):
        optimiser.zero_grad()
        _run(model.ours, model.given).float().square().mean().backward()
        optimiser.step()
        if step:
            parts.append(adapter_of(model.ours, "content"))
    if spec.mask == "upper":
        for key, parameter in parameters.items():
            flat = parameter.detach().flatten(1)
            assert not (flat.tril(-1) if spec.side == "output" else flat.triu(1)).any(), key
    return parts


def _check_reloaded(kind: str, dtype: str, model: Shared, path: Path, adapted: Tensor) -> None:
    model.stock.load_lora_adapter(str(path), prefix=PREFIXES[kind], adapter_name="content")
    try:
        # The stock loader rounds the factors to the base's dtype.
        assert relative(_output(model.stock, model.given), adapted) < (1e-5 if dtype == "fp32" else 3e-2)
    finally:
        model.stock.delete_adapters("content")
    assert torch.equal(_output(model.stock, model.given), model.base)
    again = read_adapter(path)
    assert again.header is not None


def _check_merged(parts: list[Adapter], name: str) -> None:
    if name == "dora":
        with pytest.raises(QrloraError, match="is a dora adapter and cannot be merged, since it rescales"):
            merge(parts)
        return
    shares_a_factor = parts[0].header is not None and parts[0].header.side is not None
    merged = merge(parts, [0.7, -0.4], "sum" if shares_a_factor else "concat")
    for layer, pair in merged.layers.items():
        expected = 0.7 * dense(parts[0], layer) - 0.4 * dense(parts[1], layer)
        assert relative(dense(merged, layer), expected) < 1e-5 or not expected.any()
        assert pair.rank == parts[0].layers[layer].rank * (1 if shares_a_factor else 2)
