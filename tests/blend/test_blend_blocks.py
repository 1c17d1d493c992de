"""A blend in which each role has a part of the network to itself."""

from pathlib import Path

import pytest

from qrlora.blend import blend
from qrlora.errors import QrloraError
from qrlora.formats import read_adapter
from qrlora.models import LoadedModel
from tests.blend.conftest import MakeConfig

SINGLE, DOUBLE = "single_transformer_blocks", "transformer_blocks"


def test_each_role_is_trained_on_its_blocks_and_the_merge_has_both(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    config = make_config(tmp_path, content_blocks="splitflux", style_blocks=DOUBLE, style_weights=(0.0, 1.0))
    made = blend(config, loaded=model, progress=False)
    content, style, merged = (read_adapter(path) for path in (made.content, made.style, made.merged))
    assert all(name.startswith(SINGLE) for name in content.layers)
    assert all(name.startswith(DOUBLE) for name in style.layers)
    assert merged.layers.keys() == content.layers.keys() | style.layers.keys()
    # Trained there alone, not cut out of a whole adapter.
    trained = read_adapter(tmp_path / "train" / "content" / "adapter.safetensors")
    assert trained.layers.keys() == content.layers.keys()

    # Given files of other layers are used on their blocks alone.
    again = tmp_path / "again"
    part = make_config(
        again,
        content=None,
        content_prompt=None,
        content_adapter=(made.merged,),
        content_blocks=DOUBLE,
        style=None,
        style_prompt=None,
        style_adapter=(made.content,),
        style_weights=(0.0, 1.0),
        max_train_steps=None,
        learning_rate=None,
    )
    cut = blend(part, loaded=model, progress=False)
    assert read_adapter(cut.content).layers.keys() == style.layers.keys()
    assert read_adapter(cut.style).layers.keys() == content.layers.keys()
    assert cut.style.read_bytes() == made.content.read_bytes()


def test_a_config_may_train_more_than_is_used(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("adapter:\n  blocks: [single_transformer_blocks, transformer_blocks]\n", encoding="utf-8")
    config = make_config(
        tmp_path / "out", content_blocks=SINGLE, content_config=more, style_blocks=DOUBLE, style_weights=(0.0, 1.0)
    )
    made = blend(config, loaded=model, progress=False)
    trained = read_adapter(tmp_path / "out" / "train" / "content" / "adapter.safetensors")
    assert any(name.startswith(DOUBLE) for name in trained.layers)
    assert all(name.startswith(SINGLE) for name in read_adapter(made.content).layers)


def test_refusals(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match=r"blocks='up_blocks' holds none of the .* layers, which lie in"):
        blend(make_config(tmp_path, content_blocks="up_blocks"), loaded=model, progress=False)
    more = tmp_path / "more.yaml"
    more.write_text("adapter:\n  blocks: transformer_blocks\n", encoding="utf-8")
    swept = make_config(tmp_path, content_blocks="transformer_blocks.0", content_config=more, sweep_steps=2)
    with pytest.raises(QrloraError, match="--sweep-steps shows whole adapters, but the content is trained on"):
        blend(swept, loaded=model, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"more.yaml"}
