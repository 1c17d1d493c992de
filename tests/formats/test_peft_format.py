"""The peft folder."""

import json
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from qrlora.errors import QrloraError
from qrlora.formats import Adapter, Component, LowRank, read_adapter, read_coefficients, recognise, write_peft_folder
from qrlora.formats._factors import layers_of
from tests.adapters_of_data import made


@pytest.mark.parametrize("component", ["transformer", "unet", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("header", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, component: Component, header: bool) -> None:
    adapter = Adapter(made().layers, made().header if header else None, component)
    back = read_adapter(write_peft_folder(adapter, tmp_path / "folder"))
    assert back.header == adapter.header
    assert back.component == component
    for layer, pair in adapter.layers.items():
        assert torch.equal(back.layers[layer].delta(), pair.delta())


@pytest.mark.parametrize("component", ["transformer", "unet", "text_encoder", "text_encoder_2"])
def test_a_small_file_knows_its_component(tmp_path: Path, component: Component) -> None:
    adapter = Adapter(made().layers, made().header, component)
    path = adapter.save(tmp_path / "a.safetensors", coefficients_only=True)
    assert read_coefficients(path).component == component


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """How many functions were called within, Python's and built-in ones."""
    counts = [0]

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        counts[0] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield counts
    finally:
        sys.setprofile(before)


def read_with_patterns(count: int) -> int:
    """Calls while a LoRA of `count` layers is read whose configuration has an alpha for each."""
    names = [f"blocks.{1000 + index}.attn.to_q" for index in range(count)]
    pair = LowRank(torch.ones(1, 1), torch.ones(1, 1))
    tensors = {f"{name}.lora_{key}.weight": value for name in names for key, value in (("A", pair.A), ("B", pair.B))}
    ends = {name.partition(".")[2]: 0 for name in names}  # the other table, whose entries come second
    patterns = {rf"^{name.replace('.', chr(92) + '.')}$": index for index, name in enumerate(names)} | ends
    with counted_calls() as counts:
        layers, _ = layers_of(Path("a"), tensors, {"lora_alpha": 9, "alpha_pattern": patterns}, None)
    assert [layers[name].delta().item() for name in names] == list(range(count))
    return counts[0]


def test_thousands_of_patterns_take_no_more_work_than_layers_and_patterns_together() -> None:
    read_with_patterns(10)  # what is imported or compiled at the first call
    assert read_with_patterns(2000) < 10.5 * read_with_patterns(200)  # each by each: 100 times


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"to_q": 2, "^a.to_q": 3}, 2),
        ({"^a.to_q": 3, "to_q": 2}, 3),
        ({"a.to_q": 4, "to_q": 2}, 4),
        ({"^to_q": 3, "o_q": 2, "b.a.to_q": 5}, 9),
        ({"to_q": 2, "(x+)+": 3}, 2),
    ],
)
def test_the_first_pattern_that_fits_counts(patterns: dict[str, int], expected: int) -> None:
    tensors = {f"a.to_q.lora_{key}.weight": torch.ones(1, 1) for key in "AB"}
    layers, _ = layers_of(Path("a"), tensors, {"lora_alpha": 9, "alpha_pattern": patterns}, None)
    assert layers["a.to_q"].delta().item() == expected


def test_the_configuration_is_plain(tmp_path: Path) -> None:
    config = json.loads((write_peft_folder(made(), tmp_path) / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True
    assert config["r"] == config["lora_alpha"] == 3


def test_refusals(tmp_path: Path) -> None:
    folder = write_peft_folder(made(), tmp_path / "folder")
    config = folder / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"LORA"', '"LOHA"'))
    with pytest.raises(QrloraError, match="LOHA"):
        read_adapter(folder)
    config.write_text(text[:-20])
    with pytest.raises(QrloraError, match="not JSON"):
        read_adapter(folder)
    config.write_bytes(b"\xff\xfe{")
    with pytest.raises(QrloraError, match="not UTF-8"):
        read_adapter(folder)
    config.write_text(text[:-3] + r', "bias": "\ud800"}')
    with pytest.raises(QrloraError, match="half a character"):
        read_adapter(folder)
    config.write_text(text)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(QrloraError, match="does not exist"):
        read_adapter(folder)
    with pytest.raises(QrloraError, match="is a file"):
        write_peft_folder(made(), config)


def test_a_configuration_is_not_read_beyond_its_limit(tmp_path: Path) -> None:
    folder = write_peft_folder(made(), tmp_path)
    config = folder / "adapter_config.json"
    text = config.read_text()
    limit = 16 * 2**20
    config.write_text(text + " " * (limit - len(text)))
    assert list(read_adapter(folder).layers) == list(made().layers)
    with config.open("r+b") as stream:
        stream.truncate(50 * 2**30)  # sparse: it takes no room
    tracemalloc.start()
    with pytest.raises(QrloraError, match=r"adapter_config\.json has 53687091200 bytes; a peft configuration is a few"):
        read_adapter(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    with config.open("r+b") as stream:
        stream.truncate(limit + 1)
    with pytest.raises(QrloraError, match="16777217 bytes"):
        recognise(folder)
