"""Merges of lazily read adapters: the same files, bit for bit, with a layer of each adapter in memory."""

import gc
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qrlora import load_adapter
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, LowRank, _tensors_later, read_adapter
from qrlora.merging import merge
from tests.adapters_of_data import CONV, LINEAR, made, with_words

FLUX_LIKE = [f"transformer_blocks.{index}.attn.to_q" for index in range(12)]


def saved(folder: Path, *adapters: Adapter) -> list[Path]:
    return [adapter.save(folder / f"{index}.safetensors") for index, adapter in enumerate(adapters)]


def deep(seed: int, basis_seed: int = 7) -> Adapter:
    """Twelve layers of different coefficients."""
    layers: dict[str, LowRank] = {}
    for index, name in enumerate(FLUX_LIKE):
        layers[name] = made(100 * seed + index, basis_seed=basis_seed + index).layers[LINEAR]
    return Adapter(layers, made(seed).header)


@pytest.mark.filterwarnings("ignore::qrlora.errors.QrloraWarning")
@pytest.mark.parametrize(
    ("others", "options"),
    [
        ([made(1), made(2)], {}),
        ([made(1), made(2)], {"method": "sum"}),
        ([made(1, side="input"), made(2)], {}),
        ([made(1, rank=2), made(2)], {}),
        ([made(1, basis_seed=9), made(2, header=False)], {"method": "concat", "normalize": True}),
        ([made(1), made(2)], {"normalize": True}),
        ([made(1), made(2)], {"blocks": ["blocks.0", "blocks.10", "all"]}),
        ([made(1), made(2)], {"method": "svd", "rank": 2}),
        ([made(1), made(2)], {"method": "ties"}),
        ([made(1), made(2)], {"method": "dare", "space": "coefficients"}),
        ([made(1), made(2)], {"method": "knots"}),
        ([made(1), made(2)], {"method": "lego"}),
        ([made(1), made(2)], {"method": "do"}),
        ([made(1), made(2)], {"method": "orthogonal", "strength": 0.5}),
        ([with_words(1, "text_encoder"), with_words(2, "text_encoder", "text_encoder_2", words_basis=30)], {}),
    ],
)
def test_the_same_bytes_as_in_memory(tmp_path: Path, others: list[Adapter], options: dict[str, Any]) -> None:
    files = saved(tmp_path, made(0), *others)
    weights = [0.9, -0.4, 1.5]
    written = [
        merge([load_adapter(file, lazy=lazy) for file in files], weights, **options)
        .save(tmp_path / f"{lazy}.safetensors")
        .read_bytes()
        for lazy in (True, False)
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize(("other", "expected"), [(deep(1), "sum"), (deep(1, basis_seed=90), "concat")])
def test_layers_go_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Adapter, expected: str) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    real = _tensors_later._read_one

    def watched(*arguments: Any) -> Tensor:
        nonlocal most
        tensor = real(*arguments)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(_tensors_later, "_read_one", watched)
    files = saved(tmp_path, deep(0), other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QrloraWarning)
        merged = merge([load_adapter(file, lazy=True) for file in files], [0.9, 1.0])
    assert merged.header is not None
    assert merged.header.method == expected
    assert merged.rank == (3 if expected == "sum" else 6)
    merged.save(tmp_path / "both.safetensors")
    gc.collect()
    # Of 48 tensors: A and B of one layer of both, for each thread, and what is written while the next layer is made.
    assert 4 <= most <= 4 * (min(torch.get_num_threads(), 4) + 2)
    assert len(alive) <= 4


def test_each_layer_is_read_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    real = _tensors_later._read_one

    def counted(source: Path, contents: Any, key: str) -> Tensor:
        reads.append(f"{source.name} {key}")
        return real(source, contents, key)

    monkeypatch.setattr(_tensors_later, "_read_one", counted)
    files = saved(tmp_path, deep(0), deep(1))
    merge([load_adapter(file, lazy=True) for file in files]).save(tmp_path / "both.safetensors")
    assert len(set(reads)) == 48
    assert max(map(reads.count, reads)) == 2


def test_different_bases_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    last = dict(deep(1).layers)
    last[FLUX_LIKE[-1]] = made(5, basis_seed=99).layers[LINEAR]
    files = saved(tmp_path, deep(0), replace(deep(1), layers=last))
    merged = merge([load_adapter(file, lazy=True) for file in files], method="sum")
    target = tmp_path / "both.safetensors"
    target.write_text("old")
    with pytest.raises(QrloraError, match=rf"bases of {FLUX_LIKE[-1]} differ .* use concat"):
        merged.save(target)
    assert target.read_text() == "old"


def test_what_is_not_finite_is_refused_before_anything_is_merged(tmp_path: Path) -> None:
    one = made(0)
    bad = one.layers[CONV].A.clone()
    bad[0, 0, 0, 0] = torch.inf
    other = Adapter({LINEAR: one.layers[LINEAR], CONV: LowRank(one.layers[CONV].B, bad)}, one.header, source="bad one")
    with pytest.raises(QrloraError, match=f"bad one: {CONV} has values that are not finite"):
        merge([one, other])


def test_a_merge_of_merges(tmp_path: Path) -> None:
    files = saved(tmp_path, made(0), made(1))
    one, two = (load_adapter(file, lazy=True) for file in files)
    merged = merge([merge([one, two], [0.5, 0.25]), one], [2.0, -1.0])
    expected = 0.5 * read_adapter(files[1]).layers[LINEAR].delta()
    torch.testing.assert_close(merged.layers[LINEAR].delta(), expected)
