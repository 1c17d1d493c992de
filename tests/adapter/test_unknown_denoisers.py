"""Adapters on a denoiser of no known family: `target_modules` by hand is all it takes."""

from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

from qrlora.adapter import AdapterSpec, adapters_disabled, add_adapter, save_adapter, trainable_parameters
from qrlora.errors import QrloraError
from qrlora.models import family_of

TARGETS = ["attn1.to_q", "attn1.to_out.0", "attn2.to_v", "ff.conv_point"]


def sana() -> SanaTransformer2DModel:
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=4,
    ).eval()


def output(model: SanaTransformer2DModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 3, 12, generator=generator)
    return model(latents, encoder_hidden_states=text, timestep=torch.tensor([200.0, 800.0])).sample


def test_auto_and_the_family_say_what_is_known() -> None:
    known = r"flux \(Flux.*sd3 \(SD3.*sdxl \(UNet2D.*add_adapter with target_modules\) work on other denoisers"
    with pytest.raises(QrloraError, match=rf"SanaTransformer2DModel belongs to no model family known here; .*{known}"):
        family_of(sana())
    with pytest.raises(QrloraError, match=r'target_modules="auto" is not known for SanaTransformer2DModel .*SD3Trans'):
        add_adapter(sana(), AdapterSpec(rank=2), "content")


def test_layers_by_hand_train_and_load_in_stock_diffusers(tmp_path: Path) -> None:
    model = sana()
    base = output(model).detach()
    layers = add_adapter(model, AdapterSpec(rank=2, target_modules=TARGETS), "content")
    assert len(layers) == 2 * len(TARGETS)
    torch.testing.assert_close(output(model), base)
    parameters = list(trainable_parameters(model, "content").values())
    optimiser = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(3):
        optimiser.zero_grad()
        output(model).square().mean().backward()
        optimiser.step()
    ours = output(model).detach()
    assert not torch.allclose(ours, base, rtol=1e-3)
    with adapters_disabled(model):
        assert torch.equal(output(model), base)
    path = save_adapter(model, "content", tmp_path / "content.safetensors")
    stock = sana()
    stock.load_lora_adapter(str(path), prefix="transformer", adapter_name="content")
    torch.testing.assert_close(output(stock), ours)
