"""What cannot be adapted is refused in one sentence, and the denoiser stays as it was."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from qrlora.adapter import (
    AdapterSpec,
    add_adapter,
    register_targets,
    remove_adapter,
    set_adapters,
    trainable_parameters,
)
from qrlora.errors import QrloraError
from tests.adapter.test_add_adapter import spec_for
from tests.tiny_models import tiny, tiny_flux


class TestRefused:
    """Each refusal is one sentence, and leaves the denoiser as it was."""

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rank": 33}, r"transformer_blocks\.0\.attn\.to_q .*at most 32, not 33"),
            ({"rank": 33, "basis": "lora"}, r"transformer_blocks\.0\.attn\.to_q .*at most 32, not 33"),
            ({"basis": "qrr"}, "minor, qr, random, svd, lora"),
            ({"target_modules": ["attn.to_qq"]}, r"'attn\.to_qq' matches no .*did you mean 'attn\.to_q'"),
            ({"target_modules": r".*\.nothing"}, "matches no Linear or Conv2d"),
            ({"target_modules": "(["}, "not a valid regular expression"),
        ],
    )
    def test_specs(self, fields: dict[str, Any], message: str) -> None:
        denoiser, before = tiny_flux(), str(tiny_flux())
        with pytest.raises(QrloraError, match=message):
            add_adapter(denoiser, spec_for("flux", **fields), "content")
        assert str(denoiser) == before

    @pytest.mark.parametrize(
        "name", ["a", "", "a.b", "with space", "my_lora_x", "keys", "train", "training", "_modules"]
    )
    def test_names(self, name: str) -> None:
        with pytest.raises(QrloraError, match="cannot be used"):
            add_adapter(tiny_flux(), spec_for("flux"), name)

    def test_a_name_that_is_taken(self) -> None:
        denoiser = tiny_flux()
        add_adapter(denoiser, spec_for("flux"), "content")
        with pytest.raises(QrloraError, match="already an adapter 'content'"):
            add_adapter(denoiser, spec_for("flux"), "content")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"groups": 4}, "4 groups"),
            ({"dilation": 2, "padding": 2}, "dilation"),
            ({"padding_mode": "circular"}, "circular"),
        ],
    )
    def test_convolutions_that_peft_gets_wrong(self, change: dict[str, Any], message: str) -> None:
        denoiser: Any = tiny("unet")
        denoiser.down_blocks[0].resnets[0].conv1 = nn.Conv2d(16, 16, 3, **({"padding": 1} | change))
        with pytest.raises(QrloraError, match=rf"down_blocks\.0\.resnets\.0\.conv1 .*{message}"):
            add_adapter(denoiser, spec_for("unet"), "content")

    def test_packed_meta_and_fused_weights(self) -> None:
        denoiser: Any = tiny_flux()
        layer = denoiser.transformer_blocks[0].attn.to_q
        layer.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False)
        with pytest.raises(QrloraError, match=r"attn\.to_q has a packed weight .*torch\.uint8"):
            add_adapter(denoiser, spec_for("flux"), "content")
        layer.weight = nn.Parameter(torch.zeros(32, 32).to(torch.float8_e4m3fn), requires_grad=False)
        with pytest.raises(QrloraError, match=r"attn\.to_q has a packed weight"):
            add_adapter(denoiser, spec_for("flux"), "content")
        layer.weight = nn.Parameter(torch.empty(32, 32, device="meta"))
        with pytest.raises(QrloraError, match="meta device"):
            add_adapter(denoiser, spec_for("flux"), "content")
        fused: Any = tiny_flux()
        add_adapter(fused, spec_for("flux"), "content")
        fused.fuse_lora()
        with pytest.raises(QrloraError, match="unfuse_lora"):
            add_adapter(fused, spec_for("flux"), "style")

    def test_things_that_are_no_denoiser(self) -> None:
        with pytest.raises(QrloraError, match=r"Linear is not .*pipeline\.transformer"):
            add_adapter(nn.Linear(2, 2), AdapterSpec(), "content")

    def test_auto_for_an_unknown_class_lists_the_known_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import_module("qrlora.models")  # the families register themselves once
        monkeypatch.setattr("qrlora.adapter.targets._TARGETS", {})
        register_targets("KnownModel", ("to_q",))
        with pytest.raises(QrloraError, match=r"not known for FluxTransformer2DModel .*KnownModel"):
            add_adapter(tiny_flux(), AdapterSpec(rank=4), "content")
        register_targets("FluxTransformer2DModel", ("attn.to_q",))
        names = add_adapter(tiny_flux(), AdapterSpec(rank=4), "content")
        assert names == [
            f"{kind}.{n}.attn.to_q" for kind in ("transformer_blocks", "single_transformer_blocks") for n in (0, 1)
        ]

    def test_controls_of_adapters_that_are_not_there(self) -> None:
        denoiser = tiny_flux()
        for control in (trainable_parameters, remove_adapter):
            with pytest.raises(QrloraError, match=r"no adapter 'content' .*there are: none"):
                control(denoiser, "content")
        with pytest.raises(QrloraError, match="there are: none"):
            set_adapters(denoiser, {"content": 1.0})
        add_adapter(denoiser, spec_for("flux"), "content")
        with pytest.raises(QrloraError, match="there are: content"):
            set_adapters(denoiser, {"content": 1.0, "style": 1.0})
        with pytest.raises(QrloraError, match="not a finite number"):
            set_adapters(denoiser, {"content": float("inf")})
        with pytest.raises(QrloraError, match="no adapters to set"):
            set_adapters(denoiser, {})
