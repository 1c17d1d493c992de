"""Combinations of forms, bases and files that have no meaning: one sentence each, and nothing changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qrlora.adapter import (
    AdapterSpec,
    adapter_of,
    add_adapter,
    attach_adapter,
    restore_kept,
)
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank, read_adapter, read_metadata
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


class TestDoraWithoutMagnitudes:
    """Without them a file would be taken for the plain LoRA that it is not."""

    @pytest.fixture
    def stored(self, tmp_path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        denoiser = with_form("dora")
        path = adapter_of(denoiser, "content").save(tmp_path / "dora.safetensors")
        return load_file(path), read_metadata(path)

    @pytest.mark.parametrize("metadata", ["whole", "ours alone", "diffusers' alone"])
    def test_all_are_gone(
        self, stored: tuple[dict[str, Tensor], dict[str, str]], tmp_path: Path, metadata: str
    ) -> None:
        tensors, texts = stored
        dropped = {"whole": "", "ours alone": "lora_adapter_metadata", "diffusers' alone": "qrlora"}[metadata]
        kept = {key: text for key, text in texts.items() if key != dropped}
        pairs = {key: tensor for key, tensor in tensors.items() if "magnitude" not in key}
        assert 0 < len(pairs) < len(tensors)
        save_file(pairs, tmp_path / "less.safetensors", kept)
        words = r"less\.safetensors (uses peft's use_dora, but \S+\.lora_magnitude_vector is missing|says that it is a)"
        with pytest.raises(QrloraError, match=words):
            read_adapter(tmp_path / "less.safetensors")

    @pytest.mark.parametrize("with_metadata", [True, False])
    def test_one_is_gone_or_too_short(
        self, stored: tuple[dict[str, Tensor], dict[str, str]], tmp_path: Path, with_metadata: bool
    ) -> None:
        tensors, texts = stored
        key = next(key for key in sorted(tensors) if "magnitude" in key)
        layer = key.partition(".lora_magnitude")[0].removeprefix("transformer.")
        for damaged, words in (
            ({name: tensor for name, tensor in tensors.items() if name != key}, rf"{layer}\.lora_magn\S+ is missing"),
            (tensors | {key: tensors[key][:-1].clone()}, rf"{layer}\.lora_magnitude_vector has 31 values"),
        ):
            save_file(damaged, tmp_path / "less.safetensors", texts if with_metadata else None)
            with pytest.raises(QrloraError, match=words):
                read_adapter(tmp_path / "less.safetensors")

    def test_in_memory(self) -> None:
        adapter = adapter_of(with_form("dora"), "content")
        layer = list(adapter.layers)[1]
        own = {name: {} if name == layer else tensors for name, tensors in adapter.own.items()}
        denoiser = tiny_flux()
        before = str(denoiser)
        with pytest.raises(QrloraError, match=f"{layer} says that it is a DoRA layer, but has no magnitude of"):
            attach_adapter(denoiser, Adapter(adapter.layers, adapter.header, own=own), "content")
        assert str(denoiser) == before


class TestFilesOfAnotherForm:
    """A file is checked by the form its header names, also where it is attached frozen, as its pair."""

    @pytest.mark.parametrize("trainable", [False, True])
    def test_an_odd_rank_is_not_both(self, trainable: bool) -> None:
        both = adapter_of(with_form("both"), "content")
        odd = {
            name: LowRank(torch.cat([pair.B, pair.B[:, :1]], dim=1), torch.cat([pair.A, pair.A[:1]]))
            for name, pair in both.layers.items()
        }
        denoiser = tiny_flux()
        before = str(denoiser)
        with pytest.raises(QrloraError, match=r"odd\.safetensors: .*attn\.to_q has the odd rank 9, but form 'both'"):
            attach_adapter(
                denoiser,
                Adapter(odd, both.header, source="odd.safetensors"),
                "content",
                trainable=trainable,
                spec=spec_for("both") if trainable else None,
            )
        assert str(denoiser) == before

    @pytest.mark.parametrize("name", ["both", "core"])
    def test_tensors_beside_the_pair_are_not_a_low_rank_form(self, name: str) -> None:
        adapter = adapter_of(with_form(name), "content")
        layer = next(iter(adapter.layers))
        strange = Adapter(adapter.layers, adapter.header, own={layer: {"gate": torch.ones(4)}})
        with pytest.raises(QrloraError, match=f"{layer} has gate beside its pair, which form '{name}' does not have"):
            attach_adapter(tiny_flux(), strange, "content")
