"""Combinations of forms, bases and files that have no meaning: one sentence each, and nothing changed."""

from typing import Any

import pytest
import torch

from qrlora.adapter import (
    AdapterSpec,
    adapter_of,
    add_adapter,
    attach_adapter,
    restore_kept,
)
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank
from qrlora.merging import merge
from tests.adapter_forms import FEW, spec_for, with_form
from tests.adapters_of_data import dense, relative
from tests.tiny_models import tiny, tiny_flux


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"basis": "lora_ga"}, "basis='lora_ga' starts from gradients"),
            ({"basis": "loftq"}, "basis='loftq' replaces the base"),
            ({"basis": "pissa", "form": "coefficients"}, "'pissa' does not go with form='coefficients'"),
            ({"basis": "lora", "form": "core"}, "'lora' does not go with form='core'"),
            ({"form": "both", "init": "normal"}, "init='normal' means nothing for form='both'"),
            ({"basis": "random", "band": "0/2"}, "band='0/2' needs a basis in the order of singular values"),
            ({"basis": "lora", "band": "0/2"}, "band='0/2' needs"),
            ({"basis": "olora", "band": "0/2"}, "band='0/2' needs"),
            ({"rank": 17, "band": "0/2"}, "at most 16 in each of 2 bands, not 17"),
            ({"form": "core", "basis": "ica"}, "needs orthonormal vectors"),
        ],
    )
    def test_combinations(self, fields: dict[str, Any], message: str) -> None:
        denoiser, before = tiny_flux(), str(tiny_flux())
        with pytest.raises(QrloraError, match=message):
            add_adapter(denoiser, AdapterSpec(**({"rank": 4, "target_modules": FEW["flux"]} | fields)), "content")
        assert str(denoiser) == before

    def test_specs(self) -> None:
        for bad in ({"form": "bothh"}, {"band": "2/2"}, {"band": "0/1"}, {"band": "first"}):
            with pytest.raises(ValueError, match=next(iter(bad.values()))):
                AdapterSpec(**bad)  # pyright: ignore[reportArgumentType]
        mica = AdapterSpec(basis="mica")
        assert (mica.basis, mica.side, mica.mask) == ("minor", "output", "full")
        assert AdapterSpec(form="both").mask == AdapterSpec(basis="pissa").mask == "full"

    def test_another_form_is_not_trained_further(self) -> None:
        denoiser = with_form("both")
        adapter = adapter_of(denoiser, "content")
        other = tiny_flux()
        with pytest.raises(QrloraError, match="is a both adapter, but form 'coefficients' is asked for"):
            attach_adapter(other, adapter, "content", trainable=True, spec=AdapterSpec(rank=4))
        with pytest.raises(QrloraError, match="needs the spec it was made with"):
            attach_adapter(other, adapter, "content", trainable=True)
        core = adapter_of(with_form("core"), "content")
        strange = Adapter(
            {name: LowRank(pair.B, torch.ones_like(pair.A)) for name, pair in core.layers.items()}, core.header
        )
        with pytest.raises(QrloraError, match="its frozen factors are others"):
            attach_adapter(other, strange, "content", trainable=True, spec=spec_for("core"))
        with pytest.raises(QrloraError, match="do not belong together"):
            restore_kept(denoiser, "content", {})


class TestBands:
    @pytest.mark.parametrize("basis", ["qr", "svd", "minor"])
    @pytest.mark.parametrize("side", ["output", "input"])
    def test_content_and_style_in_two_bands_merge_exactly(self, basis: str, side: str) -> None:
        denoiser = tiny("unet")
        parts: dict[str, Adapter] = {}
        for index, name in enumerate(("content", "style")):
            spec = AdapterSpec(
                rank=3, basis=basis, side=side, band=f"{index}/2", init="normal", mask="full",
                target_modules=["attn1.to_q", "conv_shortcut", "downsamplers.0.conv"],
            )  # fmt: skip
            add_adapter(denoiser, spec, name)
            parts[name] = adapter_of(denoiser, name)
        content, style = parts["content"], parts["style"]
        assert content.header is not None
        assert content.header.band == "0/2"
        merged = merge(list(parts.values()), [0.9, 1.1], "concat")
        for layer, pair in content.layers.items():
            one, two = dense(content, layer), dense(style, layer)
            across = one.T @ two if side == "output" else one @ two.T
            assert float(across.norm()) < 1e-5 * float(one.norm() * two.norm())
            assert relative(dense(merged, layer), 0.9 * one + 1.1 * two) < 1e-6
            assert merged.layers[layer].rank == 2 * pair.rank == 6

    def test_a_band_is_trained_further_as_such(self) -> None:
        denoiser = tiny_flux()
        spec = AdapterSpec(rank=3, band="1/2", target_modules=FEW["flux"])
        add_adapter(denoiser, spec, "content")
        adapter = adapter_of(denoiser, "content")
        attach_adapter(tiny_flux(), adapter, "content", trainable=True, spec=spec)
        with pytest.raises(QrloraError, match="has the band 1/2, but None is asked for"):
            attach_adapter(tiny_flux(), adapter, "content", trainable=True, spec=spec.model_copy(update={"band": None}))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"form": "lora", "basis": "svd"}, "write basis='lora' instead"),
        ({"form": "dora"}, "write basis='dora' instead"),
        ({"basis": "lora", "band": "0/2"}, "band"),
        ({"basis": "mica", "side": "input"}, "means side='output'"),
        ({"basis": "mica", "form": "both"}, "does not go with form='both'"),
    ],
)
def test_what_a_baseline_would_ignore_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises((QrloraError, ValueError), match=words):
        add_adapter(tiny_flux(), AdapterSpec(rank=2, **given), "drawn")
