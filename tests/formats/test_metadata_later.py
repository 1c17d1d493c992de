"""Files whose header's texts are known last, and what tells values that are not finite."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qrlora.errors import QrloraError
from qrlora.formats import _atomic, atomic_write, read_adapter, read_safetensors, write_safetensors
from qrlora.formats._adapter import all_finite
from qrlora.formats._write_safetensors import MetadataLater
from tests.adapters_of_data import made

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3)}


def write(path: Path, texts: Mapping[str, str], widest: Mapping[str, str]) -> bytes:
    return write_safetensors(path, TENSORS, MetadataLater(widest, lambda: texts)).read_bytes()


def test_texts_that_come_last_are_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    short, long = write(path, {"x": "1"}, {"x": "1" * 99}), write(path, {"x": "ä" * 40}, {"x": "1" * 99})
    assert len(short) == len(long)
    assert short[-36:] == long[-36:]
    tensors, texts = read_safetensors(path)
    assert texts == {"x": "ä" * 40}
    assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == texts
        assert torch.equal(file.get_tensor("b"), TENSORS["b"])


def test_texts_without_room_to_spare_make_the_usual_file(tmp_path: Path) -> None:
    usual = write_safetensors(tmp_path / "a.safetensors", TENSORS, {"x": "1"}).read_bytes()
    assert write(tmp_path / "b.safetensors", {"x": "1"}, {"x": "1"}) == usual


def test_what_goes_wrong_last_leaves_nothing(tmp_path: Path) -> None:
    def refuse() -> Mapping[str, str]:
        raise QrloraError("not so")

    with pytest.raises(QrloraError, match="not so"):
        write_safetensors(tmp_path / "a.safetensors", TENSORS, MetadataLater({}, refuse))
    with pytest.raises(RuntimeError, match="91 more than were left"):
        write(tmp_path / "a.safetensors", {"x": "1" * 99}, {"x": "1"})
    assert not list(tmp_path.iterdir())


def test_chunks_of_any_size_and_a_new_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_atomic, "_WINDOW", 1 << 16)
    chunks = [bytes([index % 251]) * size for index, size in enumerate([5, 100_000, 0, 70_000, 1, 300_000, 65_536] * 3)]
    atomic_write(tmp_path / "a.bin", iter(chunks), front=lambda: b"first")
    content = b"".join(chunks)
    assert (tmp_path / "a.bin").read_bytes() == b"first" + content[5:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_seen(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.full((7, 5), 1e30, dtype=dtype)  # in fp32 the square is not finite
    for each in (tensor, tensor.T, tensor[:, ::2]):
        assert all_finite(each)
    tensor[3, 4] = bad
    for each in (tensor, tensor.T, tensor[:, ::2]):
        assert not all_finite(each)


def test_weight_one_copies_nothing() -> None:
    adapter = made(0)
    assert adapter.scaled(1) is adapter
    with pytest.raises(QrloraError, match="not a finite number"):
        adapter.scaled(float("nan"))


@pytest.mark.parametrize("norm", [1, -5e-324, "of a stranger" * 9, 1.7976931348623157e308])
def test_headers_of_strangers_can_be_written_again(tmp_path: Path, norm: object) -> None:
    file = made(0, merged_from=[{"weight": 1.0, "norm": norm}, {}]).save(tmp_path / "a.safetensors")
    again = read_adapter(file)
    assert again.header is not None
    assert again.header.merged_from == [{"weight": 1.0, "norm": norm}, {}]
    assert again.save(tmp_path / "b.safetensors").read_bytes() == file.read_bytes()
