"""Layers and adapters as a person names them."""

import pytest

from qrlora.analysis._names import grid_of, model_order, place_of, short_names


@pytest.mark.parametrize(
    ("layer", "group", "block", "module"),
    [
        ("transformer_blocks.12.attn.to_out.0", "block", "block 12", "attn.to_out.0"),
        ("single_transformer_blocks.3.attn.to_q", "single", "single 3", "attn.to_q"),
        ("down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_k", "down", "down 1.0.2", "attn1.to_k"),
        ("mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0", "mid", "mid 0.9", "attn2.to_out.0"),
        ("up_blocks.0.resnets.1.conv1", "up", "up 0.1", "conv1"),
        ("double_layers.4.ff", "double_layers", "double_layers 4", "ff"),
    ],
)
def test_places(layer: str, group: str, block: str, module: str) -> None:
    place = place_of(layer)
    assert place is not None
    assert (place.group, place.block, place.module) == (group, block, module)


def test_names_without_blocks_have_no_place() -> None:
    for layer in ("proj_out", "context_embedder.0.proj", "transformer_blocks.1", "mid_block"):
        assert place_of(layer) is None


def test_the_order_of_the_model() -> None:
    layers = [
        "single_transformer_blocks.0.attn.to_q",
        "x_embedder",
        "transformer_blocks.10.attn.to_q",
        "transformer_blocks.2.attn.to_q",
    ]
    assert model_order(layers) == [layers[3], layers[2], layers[0], layers[1]]
    unet = ["up_blocks.0.a", "mid_block.a", "down_blocks.0.a"]
    assert model_order(unet) == unet[::-1]


def test_grid() -> None:
    grid = grid_of({"transformer_blocks.1.q": 2.0, "transformer_blocks.0.k": 1.0, "single_transformer_blocks.0.q": 3.0})
    assert grid is not None
    assert (grid.modules, grid.blocks) == (["k", "q"], ["block 0", "block 1", "single 0"])
    assert grid.cells == [[1.0, None, None], [None, 2.0, 3.0]]
    assert grid_of({"transformer_blocks.0.q": 1.0, "proj_out": 2.0}) is None


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["dog.safetensors", "out/ink.safetensors"], ["dog", "ink"]),
        (["dog/adapter.safetensors", "ink/adapter.safetensors"], ["dog", "ink"]),
        (["a/dog.safetensors", "b/dog.safetensors", "c/x.safetensors"], ["a/dog", "b/dog", "x"]),
        (["a/x/dog.safetensors", "b/x/dog.safetensors"], ["a/x/dog", "b/x/dog"]),
        (["dog.safetensors", "dog.safetensors"], ["dog", "dog (2)"]),
        (["adapter.safetensors"], ["adapter"]),
        (["v1.5/dog", "v1.6/dog"], ["v1.5/dog", "v1.6/dog"]),
    ],
)
def test_short_names(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names
