"""Merges into a file in one reading: the bytes of `merge(...).save(...)`, and nothing where something is wrong."""

import gc
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qrlora import load_adapter
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, LowRank, _tensors_later, read_adapter
from qrlora.merging import merge, merge_to_file, update_norm
from tests.adapters_of_data import CONV, LINEAR, dense, made, relative, with_words

LAYERS = [f"transformer_blocks.{index}.attn.to_q" for index in range(12)]


def saved(folder: Path, *adapters: Adapter) -> list[Path]:
    return [adapter.save(folder / f"{index}.safetensors") for index, adapter in enumerate(adapters)]


def lazily(files: list[Path]) -> list[Adapter]:
    return [load_adapter(file, lazy=True) for file in files]


def deep(seed: int, basis_seed: int = 7, last_basis: int | None = None) -> Adapter:
    """Twelve layers of different coefficients; `last_basis` is the seed of the last one's basis."""
    layers: dict[str, LowRank] = {}
    for index, name in enumerate(LAYERS):
        basis = basis_seed + index if last_basis is None or name != LAYERS[-1] else last_basis
        layers[name] = made(100 * seed + index, basis_seed=basis).layers[LINEAR]
    return Adapter(layers, made(seed).header)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor]]:
    """Every tensor read from a file, by file and key, the values as long as they live."""
    found: list[Any] = []
    real = _tensors_later._read_one

    def watched(source: Path, contents: Any, key: str) -> Tensor:
        tensor = real(source, contents, key)
        found.append((f"{source.name} {key}", weakref.ref(tensor), sum(ref() is not None for _, ref, _ in found)))
        return tensor

    monkeypatch.setattr(_tensors_later, "_read_one", watched)
    return found


@pytest.mark.filterwarnings("ignore::qrlora.errors.QrloraWarning")
@pytest.mark.parametrize("save_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("others", "options"),
    [
        ([made(1)], {}),
        ([made(1)], {"weights": [1.0, -0.5], "method": "sum"}),
        ([made(1), made(2)], {"weights": [0.9, -0.4, 1.5]}),
        ([made(1), made(1)], {"method": "concat"}),
        ([made(1, basis_seed=9)], {"weights": [0.9, 1.0]}),
        ([made(1, side="input"), made(2)], {}),
        ([made(1, rank=2), made(2)], {}),
        ([made(1, basis_seed=9), made(2, header=False)], {"method": "concat", "normalize": True}),
        ([made(1), made(2)], {"blocks": ["blocks.0", "blocks.10", "all"]}),
        ([made(1)], {"blocks": ["blocks.0", "blocks.10"]}),
        ([made(1)], {"method": "ties", "density": 0.5}),
        ([with_words(1, "text_encoder"), with_words(2, "text_encoder", "text_encoder_2", words_basis=30)], {}),
        ([with_words(1, "text_encoder"), with_words(2, "text_encoder", words_basis=30)], {"method": "sum"}),
    ],
)
def test_the_bytes_of_merge_and_save(
    tmp_path: Path, others: list[Adapter], options: dict[str, Any], save_dtype: Any
) -> None:
    files = saved(tmp_path, made(0), *others)
    whole = merge([load_adapter(file) for file in files], **options)
    expected = whole.save(tmp_path / "expected.safetensors", save_dtype=save_dtype).read_bytes()
    for lazy in (True, False):
        target = tmp_path / f"{lazy}.safetensors"
        told = merge_to_file(
            [load_adapter(file, lazy=lazy) for file in files], target, save_dtype=save_dtype, **options
        )
        assert target.read_bytes() == expected
        assert told.header == whole.header
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("other", "method", "expected", "looks"),
    [
        (deep(1), "sum", "sum", 0),
        (deep(1, basis_seed=90), "concat", "concat", 0),
        (deep(1), "auto", "sum", 4),
        (deep(1, basis_seed=90), "auto", "concat", 4),
    ],
)
def test_a_layer_is_read_once_and_one_at_a_time(
    tmp_path: Path, reads: list[Any], other: Adapter, method: str, expected: str, looks: int
) -> None:
    files = saved(tmp_path, deep(0), other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QrloraWarning)
        merged = merge_to_file(lazily(files), tmp_path / "both.safetensors", [0.9, 1.0], method)
    assert merged.header is not None
    assert merged.header.method == expected
    names = [name for name, _, _ in reads]
    assert len(set(names)) == 48
    # "auto" looks at the first layer before it begins.
    assert 48 <= len(names) <= 48 + looks
    # Of 48 tensors: a layer of both files, and what is written while the next one is made.
    assert max(alive for _, _, alive in reads) <= 8
    del merged
    gc.collect()
    assert not [name for name, ref, _ in reads if ref() is not None]


def test_values_and_norms_against_dense_ones(tmp_path: Path) -> None:
    parts = [with_words(seed, "text_encoder") for seed in (0, 1)]
    told = merge_to_file(lazily(saved(tmp_path, *parts)), tmp_path / "both.safetensors", [0.9, -1.1])
    read = read_adapter(tmp_path / "both.safetensors")
    assert read.header == told.header
    for component, part in read.components.items():
        for layer in part.layers:
            one, other = (dense(each.components[component], layer) for each in parts)
            assert relative(dense(part, layer), 0.9 * one - 1.1 * other) < 1e-6
    assert told.header is not None
    norms = [part["norm"] for part in told.header.merged_from or []]
    assert norms == pytest.approx([update_norm(part) for part in parts], rel=1e-13)
    squares = [
        [dense(each, name).square().sum() for each in one.components.values() for name in each.layers] for one in parts
    ]
    assert norms == pytest.approx([float(sum(found)) ** 0.5 for found in squares], rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*times as strong as")
def test_two_parts_at_weight_one_are_rounded_as_in_float64(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    parts: list[Adapter] = []
    for seed in (0, 1):
        adapter = made(seed)
        pair = adapter.layers[CONV]
        scales = 2.0 ** torch.randint(-70, 60, pair.A.shape, generator=generator)
        parts.append(replace(adapter, layers={CONV: LowRank(pair.B, pair.A * scales)}))
    merge_to_file(parts, tmp_path / "both.safetensors")
    exact = parts[0].layers[CONV].A.double() + parts[1].layers[CONV].A.double()
    assert torch.equal(load_file(tmp_path / "both.safetensors")[f"transformer.{CONV}.lora_A.weight"], exact.float())


def test_norms_of_any_length_have_the_same_room(tmp_path: Path) -> None:
    one = made(0)
    sizes: set[int] = set()
    for exponent in (0, -7, 3):
        target = tmp_path / f"{exponent}.safetensors"
        merge_to_file([one, one.scaled(2.0**exponent)], target, [1, 2.0**-exponent])
        sizes.add(target.stat().st_size)
    assert len(sizes) == 1


def test_bases_that_differ_late_are_concatenated_as_ever(tmp_path: Path) -> None:
    files = saved(tmp_path, deep(0), deep(1, last_basis=99))
    with pytest.warns(QrloraWarning, match=f"the bases of {LAYERS[-1]} differ .* so the adapters are concatenated"):
        merged = merge_to_file(lazily(files), tmp_path / "both.safetensors")
    assert merged.rank == 6
    with pytest.warns(QrloraWarning, match="so the adapters are concatenated"):
        merge([read_adapter(file) for file in files]).save(tmp_path / "expected.safetensors")
    assert (tmp_path / "both.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_signs_of_zero_are_kept(tmp_path: Path) -> None:
    one = made(0)
    pair = one.layers[LINEAR]
    zeros = [pair.B.clone(), pair.B.clone()]
    zeros[0][0, 0], zeros[1][0, 0] = 0.0, -0.0
    parts = [Adapter({LINEAR: LowRank(B, pair.A)}, one.header) for B in zeros]
    merge_to_file(parts, tmp_path / "both.safetensors", method="concat")
    B = load_file(tmp_path / "both.safetensors")[f"transformer.{LINEAR}.lora_B.weight"]
    assert torch.signbit(B[0, [0, 3]]).tolist() == [False, True]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "both.safetensors").write_text("old")
    return tmp_path / "both.safetensors"


def untouched(target: Path) -> bool:
    return target.read_text() == "old" and not list(target.parent.glob(".*"))


def test_an_explicit_sum_of_different_bases_is_refused(tmp_path: Path, target: Path) -> None:
    files = saved(tmp_path, deep(0), deep(1, last_basis=99))
    with pytest.raises(
        QrloraError, match=f"method sum needs one basis, but the bases of {LAYERS[-1]} differ .* concat"
    ):
        merge_to_file(lazily(files), target, method="sum")
    assert untouched(target)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(tmp_path: Path, target: Path, bad: float) -> None:
    parts = [deep(0), deep(1)]
    parts[1].layers[LAYERS[-1]].A[1, 2] = bad
    with pytest.raises(QrloraError, match=f"bad one: {LAYERS[-1]} has values that are not finite"):
        merge_to_file([parts[0], replace(parts[1], source="bad one")], target)
    assert untouched(target)


@pytest.mark.filterwarnings("error")
def test_warnings_that_are_errors_leave_the_old_file(tmp_path: Path, target: Path) -> None:
    files = saved(tmp_path, made(0), made(0).scaled(50))
    with pytest.raises(QrloraWarning, match=r"1\.safetensors is 50 times as strong as .*0\.safetensors"):
        merge_to_file(lazily(files), target)
    assert untouched(target)


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = saved(tmp_path, deep(0), deep(1))
    calls, real = 0, _tensors_later._read_one

    def interrupted(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(_tensors_later, "_read_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_to_file(lazily(files), target)
    assert untouched(target)
    assert calls == 20


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, target: Path) -> None:
    files = saved(tmp_path, deep(0), deep(1))
    adapters = lazily(files)
    deep(2).save(files[1])
    with pytest.raises(QrloraError, match=r"1\.safetensors has changed since it was opened; read it again"):
        merge_to_file(adapters, target)
    assert untouched(target)


def test_an_input_may_be_written_over(tmp_path: Path) -> None:
    files = saved(tmp_path, deep(0), deep(1))
    merge([read_adapter(file) for file in files]).save(tmp_path / "expected.safetensors")
    merge_to_file(lazily(files), files[0])
    assert files[0].read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_warnings_are_told_once_at_the_line_that_merges(tmp_path: Path) -> None:
    """Also where the denoiser's bases differ at once and a text encoder's at a later layer, so that it begins again."""
    parts: list[Adapter] = []
    for seed, basis_seed, scale in ((1, 7, 1.0), (2, 9, 100.0)):
        words = with_words(seed, "text_encoder").companions["text_encoder"]
        later = with_words(seed, "text_encoder", words_basis=20 * seed).companions["text_encoder"]
        (name,) = words.layers
        layers = {name: words.layers[name], name.replace("q_proj", "v_proj"): later.layers[name]}
        denoiser = made(seed, basis_seed=basis_seed).scaled(scale)
        parts.append(replace(denoiser, companions={"text_encoder": replace(words, layers=layers)}))
    files = saved(tmp_path, *parts)
    with warnings.catch_warnings(record=True) as expected:
        warnings.simplefilter("always")
        merge([load_adapter(file) for file in files])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        merge_to_file(lazily(files), tmp_path / "both.safetensors")
    texts = [str(each.message) for each in found]
    assert texts == [str(each.message) for each in expected]
    assert len(texts) == 3
    assert {each.filename for each in (*found, *expected)} == {__file__}


def test_warnings_of_one_reading_are_told_at_the_line_that_merges(tmp_path: Path) -> None:
    files = saved(tmp_path, made(0), made(1, basis_seed=9).scaled(100.0))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        merge_to_file(lazily(files), tmp_path / "both.safetensors")
    assert len(found) == 2
    assert {each.filename for each in found} == {__file__}


def test_a_sum_that_was_asked_for_fails_in_one_reading(tmp_path: Path, reads: list[Any]) -> None:
    one, other = with_words(1, "text_encoder"), with_words(2, "text_encoder")
    files = saved(
        tmp_path,
        replace(deep(0), companions=one.companions),
        replace(deep(1, last_basis=99), companions=other.companions),
    )
    with pytest.raises(QrloraError, match="method sum needs one basis"):
        merge_to_file(lazily(files), tmp_path / "both.safetensors", method="sum")
    names = [name for name, _, _ in reads]
    looked_at = 8  # the first layer of the text encoders, to choose for them
    assert len(names) <= len(set(names)) + looked_at


def test_factors_that_are_trained_can_be_merged(tmp_path: Path) -> None:
    adapters = [made(0), made(1)]
    trained = [
        replace(each, layers={k: LowRank(p.B, torch.nn.Parameter(p.A)) for k, p in each.layers.items()})
        for each in adapters
    ]
    for weights in ([1.0, 1.0], [0.9, 0.4]):
        merge_to_file(trained, tmp_path / "trained.safetensors", weights, "sum")
        merge_to_file(adapters, tmp_path / "plain.safetensors", weights, "sum")
        assert (tmp_path / "trained.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
