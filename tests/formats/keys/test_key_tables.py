"""The key tables against diffusers' own converters of whole checkpoints, which know the same names."""

from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

from qrlora.adapter import target_layers
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank
from qrlora.formats.keys import TABLES
from qrlora.formats.layouts._named import original_layers
from tests.real_layers import MODELS, adaptable, dense64, random_pair, real_adapter


def checkpoint_of(adapter: Adapter, family: Any, prefix: str = "") -> dict[str, Tensor]:
    """The dense updates as if they were the weights of a model in its original code, with biases of zeros."""
    _, pairs = original_layers(adapter, family)
    checkpoint: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        shape = pair.shape if len(pair.shape) > 2 else (pair.shape[0], pair.shape[1])
        checkpoint[f"{prefix}{name}.weight"] = dense64(pair).reshape(shape)
        checkpoint[f"{prefix}{name}.bias"] = torch.zeros(pair.shape[0])
    return checkpoint


def assert_converted(converted: dict[str, Tensor], adapter: Adapter) -> None:
    for path, pair in adapter.layers.items():
        torch.testing.assert_close(converted[f"{path}.weight"].flatten(1), dense64(pair), rtol=0, atol=1e-12)


def test_sd3() -> None:
    adapter = real_adapter("sd3")
    checkpoint = checkpoint_of(adapter, "sd3")
    checkpoint["pos_embed"] = torch.zeros(1, 4, 32)
    # The text output of the last block, which the original code has and nothing uses.
    assert_converted(single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint), adapter)


def test_sd3_with_two_attentions() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"transformer_blocks.0.attn2.{each}" for each in ("to_q", "to_k", "to_v", "to_out.0")]
    extra = {name: random_pair((32, 32), 2, generator) for name in names}
    adapter = Adapter({**real_adapter("sd3").layers, **extra})
    checkpoint = checkpoint_of(adapter, "sd3")
    checkpoint["pos_embed"] = torch.zeros(1, 4, 32)
    assert_converted(single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint), adapter)


def test_sdxl() -> None:
    adapter = real_adapter("sdxl", rank=1)
    checkpoint: Any = checkpoint_of(adapter, "sdxl", prefix="model.diffusion_model.")
    config = {**MODELS["sdxl"]().config, "class_embed_type": None}  # type: ignore[arg-type]
    assert_converted(single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config), adapter)


def test_sd15() -> None:
    adapter = real_adapter("sd15", rank=1)
    checkpoint: Any = checkpoint_of(adapter, "sd15", prefix="model.diffusion_model.")
    config = {**MODELS["sd15"]().config, "class_embed_type": None}  # type: ignore[arg-type]
    assert_converted(single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config), adapter)


def test_flux2() -> None:
    adapter = real_adapter("flux2")
    checkpoint = {key: value for key, value in checkpoint_of(adapter, "flux2").items() if key.endswith(".weight")}
    assert_converted(single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(checkpoint), adapter)


def test_z_image() -> None:
    adapter = real_adapter("z-image")
    checkpoint = {key: value for key, value in checkpoint_of(adapter, "z-image").items() if key.endswith(".weight")}
    assert_converted(single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(checkpoint), adapter)


def test_flux_at_full_width() -> None:
    """The converter knows no other width than 3072; inputs of a few units make it cheap."""
    generator = torch.Generator().manual_seed(0)
    shapes = {path: (rows * 96, 4) for path, (rows, *_) in adaptable("flux").items()}
    shapes = {path: shape for path, shape in shapes.items() if path not in ("proj_out", "x_embedder")}
    shapes |= {"proj_out": (8, 4), "x_embedder": (3072, 4)}
    adapter = Adapter({path: random_pair(shape, 1, generator) for path, shape in shapes.items()})
    checkpoint = checkpoint_of(adapter, "flux")
    for block, streams in (("double_blocks", ("img_attn.", "txt_attn.")), ("single_blocks", ("",))):
        for stream in streams:
            for norm in ("query_norm", "key_norm"):
                for index in range(2):
                    checkpoint[f"{block}.{index}.{stream}norm.{norm}.scale"] = torch.zeros(1)
    assert_converted(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint), adapter)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.family)
@pytest.mark.parametrize("underscored", [False, True])
def test_every_name_is_found_again(table: Any, underscored: bool) -> None:
    for entry in table.entries:
        numbers = ["3", "17"][: entry.name.count("{}")]
        name = entry.name.format(*numbers)
        spelling = name.replace(".", "_") if underscored else name
        target = table.by_name(spelling, underscored=underscored)
        assert target is not None
        assert target.name == name
        for index, part in enumerate(target.parts):
            path = part.path.replace(".", "_") if underscored else part.path
            found = table.by_path(path, underscored=underscored)
            assert found is not None
            assert found == (target, index)


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_of_the_model_has_a_name(kind: str) -> None:
    table = next(table for table in TABLES if table.family == kind)
    assert [path for path in adaptable(kind) if table.by_path(path) is None] == []


@pytest.mark.parametrize("name", ["double_blocks.01.img_mlp.0", "double_blocks.x.img_mlp.0", "double_blocks.0.img_mlp"])
def test_other_names_are_not(name: str) -> None:
    assert all(table.by_name(name) is None and table.by_path(name) is None for table in TABLES)


def test_families_are_told_apart_or_asked_for() -> None:
    for kind in MODELS:
        assert original_layers(real_adapter(kind), None)[0].family == kind
    ends = ("attn.to_q", "attn.add_q_proj", "attn.to_add_out")
    assert original_layers(real_adapter("sd3", *ends), None)[0].family == "sd3"
    with pytest.raises(QrloraError, match="say --family flux, --family flux2, --family qwen-image or --family sd3"):
        original_layers(real_adapter("sd3", "attn.to_q"), None)
    # as the families themselves adapt them
    for kind in ("flux", "flux2", "qwen-image", "z-image", "sd15"):
        layers = {path: real_adapter(kind).layers[path] for path in target_layers(MODELS[kind]())}
        adapter = Adapter(layers, None, real_adapter(kind).component)
        assert original_layers(adapter, None)[0].family == kind, kind
    # 60 blocks, whatever of them is adapted
    deep = Adapter({"transformer_blocks.59.attn.to_q": random_pair((4, 4), 2, torch.Generator())})
    assert original_layers(deep, None)[0].family == "qwen-image"


def test_u_nets_are_told_apart_or_asked_for() -> None:
    generator = torch.Generator()

    def unet(path: str, inputs: int = 8) -> Adapter:
        return Adapter({path: random_pair((8, inputs), 2, generator)}, None, "unet")

    block = "transformer_blocks.0"
    assert original_layers(unet(f"mid_block.attentions.0.{block}.attn2.to_k", 2048), None)[0].family == "sdxl"
    assert original_layers(unet(f"mid_block.attentions.0.{block}.attn2.to_k", 768), None)[0].family == "sd15"
    assert original_layers(unet(f"up_blocks.0.attentions.1.{block}.attn1.to_q"), None)[0].family == "sdxl"
    assert original_layers(unet("down_blocks.1.attentions.1.transformer_blocks.1.attn1.to_q"), None)[0].family == "sdxl"
    assert original_layers(unet(f"up_blocks.2.attentions.1.{block}.attn1.to_q"), None)[0].family == "sd15"
    with pytest.raises(QrloraError, match="say --family sd15 or --family sdxl"):
        original_layers(unet(f"mid_block.attentions.0.{block}.attn1.to_q"), None)


def test_what_sd3_and_others_share() -> None:
    assert set(original_layers(real_adapter("sd3", "attn.to_q"), "flux")[1]) == {
        "double_blocks.0.img_attn.qkv",
        "double_blocks.1.img_attn.qkv",
    }
    with pytest.raises(QrloraError, match="'sd1' is not known"):
        original_layers(real_adapter("sd3"), "sd1")
    with pytest.raises(QrloraError, match=r"blocks\.0\.odd, which has no name"):
        original_layers(Adapter({"blocks.0.odd": LowRank(torch.ones(2, 1), torch.ones(1, 2))}), "flux")
    with pytest.raises(QrloraError, match=r"blocks\.0\.odd, which has no name in the original code of any family"):
        original_layers(Adapter({"blocks.0.odd": LowRank(torch.ones(2, 1), torch.ones(1, 2))}), None)
    with pytest.raises(QrloraError, match="layers that flux and sd3 share"):
        original_layers(real_adapter("flux", "ff.net.2"), None)
