"""ICA adapters: one stored basis, exact merges, coefficients alone, and what is said before a long wait."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qrlora.adapter import (
    AdapterSpec,
    BasisCache,
    adapter_of,
    add_adapter,
    attach_adapter,
    basis_notice,
    estimate_seconds,
    resolve_coefficients,
)
from qrlora.adapter import _estimate as module
from qrlora.basis import make_basis
from qrlora.errors import QrloraError
from qrlora.formats import read_adapter, read_coefficients
from qrlora.merging import merge
from tests.adapter.test_add_adapter import shake
from tests.tiny_models import flux_inputs, output, tiny_flux

TARGETS = ["attn.to_q", "ff.net.2"]
# Random weights have no independent components to converge to.
pytestmark = pytest.mark.filterwarnings("ignore:.*FastICA did not converge")


def spec(**fields: Any) -> AdapterSpec:
    return AdapterSpec(**({"rank": 2, "basis": "ica", "target_modules": TARGETS} | fields))


def trained(seed: int, **fields: Any) -> tuple[Any, Any]:
    denoiser = tiny_flux()
    add_adapter(denoiser, spec(seed=seed, **fields), "content")
    shake(denoiser, "content", seed=seed)
    return denoiser, adapter_of(denoiser, "content")


def dense(adapter: Any, layer: str) -> Tensor:
    return adapter.layers[layer].B.double() @ adapter.layers[layer].A.double()


@pytest.mark.parametrize("side", ["output", "input"])
def test_content_and_style_share_a_basis_and_merge_exactly(side: str, tmp_path: Path) -> None:
    _, content = trained(3, side=side)
    BasisCache.forget()
    for entry in BasisCache().folder.iterdir():  # computed again, with everything else seeded otherwise
        entry.unlink()
    torch.manual_seed(99)
    _, style = trained(4, side=side)
    assert content.header.fingerprint == style.header.fingerprint
    files = [each.save(tmp_path / f"{name}.safetensors") for name, each in (("c", content), ("s", style))]
    merged = merge([read_adapter(path) for path in files], [0.9, 1.1], method="sum")
    for layer, pair in merged.layers.items():
        expected = 0.9 * dense(content, layer) + 1.1 * dense(style, layer)
        assert pair.rank == 2
        assert float((dense(merged, layer) - expected).norm() / expected.norm()) < 1e-6
    denoiser, given = tiny_flux(), flux_inputs()
    weights = {layer: denoiser.get_submodule(layer).weight.detach().clone() for layer in merged.layers}
    attach_adapter(denoiser, merged, "merged")
    adapted, plain = output(denoiser, given), tiny_flux()
    for layer, weight in weights.items():
        change = 0.9 * dense(content, layer) + 1.1 * dense(style, layer)
        plain.get_submodule(layer).weight.data = (weight.double() + change).float()
    torch.testing.assert_close(adapted, output(plain, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["output", "input"])
def test_the_frozen_factor_is_the_component_and_stays(side: str) -> None:
    denoiser = tiny_flux()
    layers = add_adapter(denoiser, spec(side=side), "content")
    for name in layers:
        layer: Any = denoiser.get_submodule(name)
        basis = make_basis(layer.get_base_layer().weight, 2, "ica", side=side)  # pyright: ignore[reportArgumentType]
        frozen = layer.lora_B["content"].weight if side == "output" else layer.lora_A["content"].weight.T
        trained_factor = layer.lora_A["content"].weight if side == "output" else layer.lora_B["content"].weight
        assert torch.equal(frozen, basis.vectors)
        assert (frozen.requires_grad, trained_factor.requires_grad) == (False, True)


def test_coefficients_alone_find_their_components_again_and_no_others(tmp_path: Path) -> None:
    _, adapter = trained(3)
    path = adapter.save(tmp_path / "small.safetensors", coefficients_only=True)
    BasisCache.forget()
    back = resolve_coefficients(read_coefficients(path), tiny_flux())
    assert all(torch.equal(back.layers[name].delta(), pair.delta()) for name, pair in adapter.layers.items())
    # The same components in another order span the same space, yet they are another basis.
    file = read_coefficients(path)
    name = next(iter(file.layers))
    file.layers[name].fingerprint.copy_(file.layers[name].fingerprint.flip(1))
    with pytest.raises(QrloraError, match="cannot be found again"):
        resolve_coefficients(file, tiny_flux())


def test_a_long_wait_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = tiny_flux()
    asked: list[int] = []

    def seconds(name: str, shapes: Any, rank: int, device: Any = None) -> float | None:
        asked.append(len(shapes))
        return None if name != "ica" else 1500.0 * len(shapes)

    monkeypatch.setattr(module, "basis_seconds", seconds)
    assert estimate_seconds(denoiser, spec(basis="qr")) is None
    assert estimate_seconds(denoiser, spec(basis="lora")) is None
    layers = len(add_adapter(tiny_flux(), spec(target_modules=["ff.net.2"]), "some"))
    assert layers == 2
    notice = basis_notice(denoiser, spec())
    # ff.net.2 is in the cache already: the four to_q are left.
    assert asked[-1] == 4
    assert notice is not None
    assert notice.startswith("basis ica: up to about 1.7 h")
    assert basis_notice(denoiser, spec(target_modules=["ff.net.2"])) is None
    monkeypatch.undo()
    real = estimate_seconds(denoiser, spec())
    assert real is not None
    assert real > 0
