"""Parts of a network by name."""

import pytest
from diffusers import FluxTransformer2DModel

from qrlora.adapter import AdapterSpec, add_adapter, block_names, layers_in, remove_adapter, target_layers
from qrlora.errors import QrloraError
from qrlora.training import TrainConfig
from tests.tiny_models import tiny_flux

PATHS = [f"single_transformer_blocks.{index}.attn.to_q" for index in range(12)] + ["transformer_blocks.1.attn.to_q"]


def test_ranges_count_numbers_not_letters() -> None:
    assert layers_in("single_transformer_blocks.1-2", PATHS) == PATHS[1:3]
    assert layers_in("single_transformer_blocks.9-30", PATHS) == PATHS[9:12]
    assert layers_in(["transformer_blocks.1", "single_transformer_blocks.0-0"], PATHS) == [PATHS[0], PATHS[12]]


def test_expressions_match_whole_components_from_the_beginning() -> None:
    assert layers_in("single_transformer_blocks.1", PATHS) == [PATHS[1]]  # not 10 and 11
    assert layers_in(r"single_transformer_blocks\.1\d", PATHS) == PATHS[10:12]
    assert layers_in("transformer_blocks", PATHS) == [PATHS[12]]


def test_presets() -> None:
    assert {"splitflux", "splitflux-content", "splitflux-style"} <= set(block_names())
    assert layers_in("splitflux", PATHS) == PATHS[:12]
    assert layers_in("splitflux-content", PATHS) == PATHS[:10]
    assert layers_in("splitflux-style", PATHS) == PATHS[10:12]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("splitfluks", "blocks='splitfluks' holds none of the 13 layers; did you mean 'splitflux'"),
        ("up_blocks", "holds none of the 13 layers, which lie in single_transformer_blocks, transformer_blocks."),
        ("single_transformer_blocks.3-1", "empty range"),
        ("(", "no valid regular expression"),
    ],
)
def test_refusals(blocks: str, message: str) -> None:
    with pytest.raises(QrloraError, match=message):
        layers_in(blocks, PATHS)


def test_a_configuration_with_broken_blocks_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(QrloraError, match=r"adapter\.blocks='\(' is not valid: .*no valid regular expression"):
        TrainConfig.parse({"instance_data_dir": "x", "output_dir": "y", "adapter.blocks": "("})


def test_only_the_blocks_are_adapted() -> None:
    model: FluxTransformer2DModel = tiny_flux()
    spec = AdapterSpec(rank=2, target_modules=["attn.to_q", "ff.net.2"], blocks="single_transformer_blocks.1-1")
    assert target_layers(model, spec.target_modules, spec.blocks) == ["single_transformer_blocks.1.attn.to_q"]
    assert add_adapter(model, spec, "style") == ["single_transformer_blocks.1.attn.to_q"]
    remove_adapter(model, "style")
