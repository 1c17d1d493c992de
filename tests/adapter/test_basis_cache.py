"""Bases are computed once, kept on disk, and never taken from an entry that is not right."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qrlora.adapter import AdapterSpec, BasisCache, add_adapter, default_cache_folder
from qrlora.adapter import _cache as module
from qrlora.basis import Basis, principal_angle
from qrlora.errors import QrloraWarning
from tests.tiny_models import tiny_flux


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers whose basis is really computed."""
    made: list[str] = []
    real = module.make_basis

    def counted(weight: Tensor, *args: object, layer: str, **fields: object) -> Basis:
        made.append(layer)
        return real(weight, *args, layer=layer, **fields)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "make_basis", counted)
    return made


def weight(seed: int = 0) -> Tensor:
    return torch.randn(24, 20, generator=torch.Generator().manual_seed(seed))


SPEC = AdapterSpec(rank=4)


def test_computed_once_a_process_and_read_in_the_next(tmp_path: Path, calls: list[str]) -> None:
    first = BasisCache(tmp_path).get(weight(), SPEC, "a")
    assert BasisCache(tmp_path).get(weight(), SPEC, "b") is first
    assert calls == ["a"]
    BasisCache.forget()
    again = BasisCache(tmp_path).get(weight(), SPEC, "c")
    assert calls == ["a"]
    assert torch.equal(again.vectors, first.vectors)
    assert (again.name, again.side, again.solver, again.angle) == (first.name, first.side, first.solver, first.angle)


def test_entries_differ_by_weight_and_by_what_is_asked(tmp_path: Path, calls: list[str]) -> None:
    cache = BasisCache(tmp_path)
    asked = [
        (weight(), SPEC),
        (weight(1), SPEC),
        (weight().double(), SPEC),
        (weight(), AdapterSpec(rank=5)),
        (weight(), AdapterSpec(rank=4, side="input")),
        (weight(), AdapterSpec(rank=4, basis="svd")),
        (weight(), AdapterSpec(rank=4, basis="random")),
        (weight(), AdapterSpec(rank=4, basis="random", seed=1)),
        (weight(), AdapterSpec(rank=4, solver="exact")),
    ]
    for each, spec in asked:
        cache.get(each, spec, "layer")
    assert len(calls) == len(asked) == len(list(tmp_path.iterdir()))
    # A seed changes the coefficients' start alone, so other seeds share the basis.
    cache.get(weight(), AdapterSpec(rank=4, seed=9, init="normal", lora_alpha=3, mask="full"), "layer")
    assert len(calls) == len(asked)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "foreign", "unlabelled", "skewed", "replaced"])
def test_a_bad_entry_is_rebuilt_with_a_warning(tmp_path: Path, calls: list[str], damage: str) -> None:
    right = BasisCache(tmp_path).get(weight(), SPEC, "a").vectors.clone()
    (path,) = tmp_path.iterdir()
    _damage(path, damage, tmp_path)
    BasisCache.forget()
    with pytest.warns(QrloraWarning, match=r"an entry of the basis cache is rebuilt"):
        rebuilt = BasisCache(tmp_path).get(weight(), SPEC, "b")
    assert calls[0] == "a"
    assert calls[-1] == "b"
    assert torch.equal(rebuilt.vectors, right)
    BasisCache.forget()
    count = len(calls)
    assert torch.equal(BasisCache(tmp_path).get(weight(), SPEC, "c").vectors, right)
    assert len(calls) == count


def _damage(path: Path, damage: str, folder: Path) -> None:
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-7])
    elif damage == "garbage":
        path.write_bytes(b"garbage")
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    elif damage == "unlabelled":
        save_file(load_file(path), path)
    elif damage == "skewed":
        entry = json.loads(_entry(path))
        vectors = load_file(path)["vectors"] * 1.01
        entry["checksum"] = module._checksum(vectors)
        save_file({"vectors": vectors}, path, {"qrlora_basis": json.dumps(entry)})
    else:
        other = folder / "other"
        BasisCache(other).get(weight(1), SPEC, "z")
        (found,) = other.iterdir()
        path.write_bytes(found.read_bytes())


def _entry(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()["qrlora_basis"]


def test_a_folder_that_cannot_be_written_is_told_and_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.warns(QrloraWarning, match="not kept for the next run"):
        basis = BasisCache(tmp_path / "file" / "below").get(weight(), SPEC, "a")
    assert basis.vectors.shape == (24, 4)


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRLORA_CACHE", str(tmp_path / "mine"))
    assert default_cache_folder() == tmp_path / "mine"
    add_adapter(tiny_flux(), AdapterSpec(rank=4, target_modules=["attn.to_q"]), "content")
    assert len(list((tmp_path / "mine").iterdir())) == 4
    monkeypatch.delenv("QRLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert default_cache_folder().name == "qrlora"


def test_the_kept_basis_spans_the_exact_leading_space(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(24, 20, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))[0]
    matrix = (left * torch.arange(1, 21).double().pow(-0.5)) @ right.T
    found = BasisCache(tmp_path).get(matrix.float(), SPEC, "a").vectors
    assert principal_angle(found.double(), left[:, :4]) < 0.01
