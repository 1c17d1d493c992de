"""Reports of adapters, their numbers against dense float64 matrices, and the folder."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.adapter import AdapterSpec, adapter_of, add_adapter
from qrlora.analysis import ExpertUsage, Report, analyze, write_report
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, Header, LowRank
from qrlora.merging import merge
from tests.adapters_of_data import CONV, LINEAR, dense, made, with_words
from tests.tiny_models import tiny_flux

FEW = {"draws": 3}


def blocks(seed: int, count: int = 2, **fields: object) -> Adapter:
    """Layers with names of a family, some Linear, some Conv2d."""
    layers: dict[str, LowRank] = {}
    for block in range(count):
        one = made(seed + 10 * block, **fields)  # pyright: ignore[reportArgumentType]
        layers[f"transformer_blocks.{block}.attn.to_q"] = one.layers[LINEAR]
        layers[f"transformer_blocks.{block}.conv"] = one.layers[CONV]
    return Adapter(layers, made(seed, **fields).header)  # pyright: ignore[reportArgumentType]


def test_a_pair_on_one_basis() -> None:
    one, two = blocks(0), blocks(1)
    report = analyze([one, two], names=["dog", "ink"], **FEW)
    (pair,) = report.pairs
    assert [entry.layer for entry in pair.layers] == [
        f"transformer_blocks.{block}.{module}" for block in (0, 1) for module in ("attn.to_q", "conv")
    ]
    assert all(entry.shared_basis for entry in pair.layers)
    for entry in pair.layers:
        first, second = dense(one, entry.layer), dense(two, entry.layer)
        cosine = float((first * second).sum() / (first.norm() * second.norm()))
        assert entry.measures["update.cosine"].value == pytest.approx(cosine, rel=1e-5)
        assert entry.measures["Q.cosine"].value == pytest.approx(1, abs=1e-6)
        assert entry.measures["output.overlap"].value == pytest.approx(1, abs=1e-6)
        assert entry.norms == pytest.approx((float(first.norm()), float(second.norm())), rel=1e-5)
        assert entry.output_angles == pytest.approx([0, 0, 0], abs=1e-4)
        assert len(entry.input_angles) == 3
        assert all(measure.random_std is not None for measure in entry.measures.values())
    whole = [torch.cat([dense(adapter, entry.layer).flatten() for entry in pair.layers]) for adapter in (one, two)]
    cosine = float(whole[0] @ whole[1] / (whole[0].norm() * whole[1].norm()))
    assert pair.total["update.cosine"].value == pytest.approx(cosine, rel=1e-5)
    assert pair.norms == pytest.approx([float(each.norm()) for each in whole], rel=1e-5)
    mean = np.mean([entry.measures["dR.cka"].value for entry in pair.layers])
    assert pair.total["dR.cka"].value == pytest.approx(mean, rel=1e-5)
    assert any("merge exactly by sum, at rank 3" in note for note in pair.notes)
    assert any("--model" in note for note in report.notes)


def test_facts_of_one_adapter() -> None:
    adapter = blocks(0)
    (facts,) = analyze([adapter], **FEW).adapters
    assert facts.name == "adapter 1"
    assert (facts.basis, facts.side, facts.rank) == ("qr", "output", 3)
    for entry in facts.layers:
        values = np.linalg.svd(dense(adapter, entry.layer).numpy(), compute_uv=False)[:3]
        shares = values / values.sum()
        assert entry.spectrum == pytest.approx(values, rel=1e-5)
        assert entry.norm == pytest.approx(np.linalg.norm(values), rel=1e-5)
        assert entry.effective_rank == pytest.approx(math.exp(-sum(shares * np.log(shares))), rel=1e-5)
    assert facts.norm == pytest.approx(math.hypot(*(entry.norm for entry in facts.layers)), rel=1e-5)


def test_other_tools_other_ranks_other_sides() -> None:
    ours, plain, other = blocks(0), blocks(1, header=False, rank=2), blocks(2, side="input")
    report = analyze([ours, plain, other], names=["ours", "plain", "other"], **FEW)
    assert [(pair.first, pair.second) for pair in report.pairs] == [(0, 1), (0, 2), (1, 2)]
    first, second, _ = report.pairs
    assert {name for name in first.total if name.startswith("lora")} == {"lora_A.cka", "lora_B.cka"}
    assert any("ranks differ" in note for note in first.notes)
    assert any("concat, at rank 3 + 2 = 5" in note for note in first.notes)
    assert "lora_A.cosine" in second.total
    assert any("not unique" in note for note in second.notes)
    assert not any("--model" in note for note in report.notes)


def test_common_layers_are_compared_and_the_others_named() -> None:
    one = blocks(0, 2)
    two = Adapter(
        {
            "transformer_blocks.0.attn.to_q": one.layers["transformer_blocks.0.attn.to_q"],
            "transformer_blocks.0.conv": LowRank(torch.randn(8, 3), torch.randn(3, 5)),
            "proj_out": one.layers["transformer_blocks.0.attn.to_q"],
        },
        one.header,
    )
    (pair,) = analyze([one, two], names=["one", "two"], **FEW).pairs
    assert [entry.layer for entry in pair.layers] == ["transformer_blocks.0.attn.to_q"]
    assert pair.only_first == ["transformer_blocks.1.attn.to_q", "transformer_blocks.1.conv"]
    assert (pair.only_second, pair.other_shape) == (["proj_out"], ["transformer_blocks.0.conv"])
    assert any("2 layers only one adapts are not compared" in note for note in pair.notes)
    assert any("1 layer only two adapts is not compared: proj_out" in note for note in pair.notes)
    assert any("different shapes" in note for note in pair.notes)


def without(adapter: Adapter, *layers: str) -> Adapter:
    return Adapter({name: pair for name, pair in adapter.layers.items() if name not in layers}, adapter.header)


def reshaped(adapter: Adapter, layer: str) -> Adapter:
    return Adapter({**adapter.layers, layer: LowRank(torch.randn(9, 3), torch.randn(3, 5))}, adapter.header)


def on_base(adapter: Adapter, digest: str) -> Adapter:
    assert adapter.header is not None
    hashes = {"weight_hashes": dict.fromkeys(adapter.layers, f"float32:{digest}")}
    return Adapter(adapter.layers, adapter.header.model_copy(update=hashes))


CONV_0 = "transformer_blocks.0.conv"


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        (blocks(0), without(blocks(1), CONV_0), "They adapt different layers, so merge refuses them"),
        (without(blocks(0), CONV_0), blocks(1), "They adapt different layers, so merge refuses them"),
        (blocks(0), reshaped(blocks(1), CONV_0), "They adapt different layers, so merge refuses them"),
        (on_base(blocks(0), "a"), on_base(blocks(1), "b"), "ink was trained on another base model than dog"),
    ],
    ids=["one has less", "the other has less", "another shape", "another base"],
)
def test_no_merge_is_promised_where_merge_refuses(one: Adapter, two: Adapter, said: str, tmp_path: Path) -> None:
    with pytest.raises(QrloraError):
        merge([one, two])
    with pytest.warns(QrloraWarning, match="dog is .* times as strong as ink") as warned:
        report = analyze([one.scaled(9), two], names=["dog", "ink"], **FEW)
    (pair,) = report.pairs
    assert not pair.mergeable
    assert any(said in note for note in pair.notes)
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    told = [*pair.notes, *(str(warning.message) for warning in warned), page]
    assert not any("merge exactly" in text or "--normalize" in text or "Merged as they are" in text for text in told)
    with pytest.warns(QrloraWarning, match="--normalize"):
        (pair,) = analyze([one.scaled(9), one], names=["dog", "ink"], **FEW).pairs
    assert pair.mergeable


def test_unequal_and_zero_updates() -> None:
    one = blocks(0)
    zero = Adapter({name: LowRank(pair.B, 0 * pair.A) for name, pair in one.layers.items()}, one.header)
    with pytest.warns(QrloraWarning, match="dog is 5 times as strong as ink.* --normalize, or give ink a larger"):
        analyze([one.scaled(5), one], names=["dog", "ink"], **FEW)
    with pytest.warns(QrloraWarning, match="update of ink is zero"):
        report = analyze([one, zero], names=["dog", "ink"], **FEW)
    assert report.pairs[0].norm_ratio is None
    assert "update.cosine" not in report.pairs[0].total
    assert report.pairs[0].layers[0].input_angles == []
    assert report.adapters[1].layers[0].effective_rank == 0


def test_r_needs_the_base() -> None:
    denoiser = tiny_flux()
    spec = AdapterSpec(rank=3, target_modules=["attn.to_q", "ff.net.2"], init="normal", mask="full")
    adapters: list[Adapter] = []
    for index, (name, side) in enumerate((("first", "output"), ("second", "output"), ("third", "input"))):
        add_adapter(denoiser, spec.model_copy(update={"seed": index, "side": side}), name)
        adapters.append(adapter_of(denoiser, name))
    report = analyze(adapters[:2], denoiser=denoiser, **FEW)
    assert report.pairs[0].total["R.cosine"].value == pytest.approx(1, abs=1e-6)
    assert report.pairs[0].total["R.cosine"].random_std is not None
    assert report.notes == []
    svd = AdapterSpec(rank=3, basis="random", target_modules=["attn.to_q", "ff.net.2"], init="normal", mask="full")
    add_adapter(denoiser, svd, "fourth")
    other = adapter_of(denoiser, "fourth")
    (pair,) = analyze([adapters[0], other], denoiser=denoiser, **FEW).pairs
    entry = pair.layers[0]
    weight = dict(tiny_flux().named_modules())[entry.layer].weight.detach().double()
    first, second = (one.layers[entry.layer].B.double().T @ weight for one in (adapters[0], other))
    expected = float((first * second).sum() / (first.norm() * second.norm()))
    assert entry.measures["R.cosine"].value == pytest.approx(expected, rel=1e-5)
    with pytest.raises(QrloraError, match="another base model"):
        analyze(adapters[:1], denoiser=tiny_flux(1))
    with pytest.raises(QrloraError, match=f"adapts {LINEAR}, which .* does not have"):
        analyze([made(0)], denoiser=denoiser)
    layer = next(iter(adapters[0].layers))
    bare = Adapter(adapters[0].layers, None, source="bare.safetensors")  # nothing but its shapes tells its base
    wide = rf"bare\.safetensors adapts {layer} as a weight of shape \[32, 32\], but here it has \[64, 64\]; load the"
    with pytest.raises(QrloraError, match=wide):
        analyze([bare], denoiser=tiny_flux(width=64))


def test_gated_adapters() -> None:
    def gated(seed: int) -> Adapter:
        plain = blocks(seed)
        generator = torch.Generator().manual_seed(seed)
        own = {
            name: {"gate_weight": torch.randn(3, math.prod(pair.A.shape[1:]), generator=generator)}
            for name, pair in plain.layers.items()
        }
        return Adapter(plain.layers, Header(basis="qr", side="output", form="gated", rank=3), own=own)

    one, two = gated(0), gated(1)
    report = analyze([one, two], names=["one", "two"], **FEW)
    entry = report.pairs[0].layers[0]
    first, second = (each.own[entry.layer]["gate_weight"].double() for each in (one, two))
    expected = float((first * second).sum() / (first.norm() * second.norm()))
    assert entry.measures["gate.cosine"].value == pytest.approx(expected, rel=1e-5)
    assert not report.pairs[0].mergeable
    assert any("do not merge" in note for note in report.pairs[0].notes)
    assert any("every gate were fully open" in note for note in report.notes)


def test_companions_are_left_out_and_that_is_said() -> None:
    parts = [with_words(seed, "text_encoder") for seed in (0, 1)]
    report = analyze(parts, names=["dog", "ink"])
    assert report.pairs == analyze([part.alone() for part in parts], names=["dog", "ink"]).pairs
    assert report.notes[-1].startswith("dog, ink: the adapters of text encoders are left out.")
    words = analyze([part.companions["text_encoder"] for part in parts], names=["dog", "ink"])
    assert words.adapters[0].component == "text_encoder"
    one, other = (dense(part.companions["text_encoder"], words.adapters[0].layers[0].layer) for part in parts)
    cosine = float((one * other).sum() / one.norm() / other.norm())
    assert words.pairs[0].total["update.cosine"].value == pytest.approx(cosine, abs=1e-5)


def test_refusals() -> None:
    with pytest.raises(QrloraError, match="nothing to analyze"):
        analyze([])
    with pytest.raises(QrloraError, match="draws=1"):
        analyze([made(0)], draws=1)
    with pytest.raises(QrloraError, match="no layer in common"):
        analyze([made(0), blocks(1)])
    with pytest.raises(QrloraError, match="as many different names"):
        analyze([made(0), made(1)], names=["a", "a"])
    bad = made(1)
    bad.layers[CONV].A[0] = math.nan
    with pytest.raises(QrloraError, match=f"adapter 2: {CONV} has values that are not finite"):
        analyze([made(0), bad])


def test_same_seed_same_report() -> None:
    adapters = [blocks(0), blocks(1)]
    seen: list[tuple[int, int]] = []
    one = analyze(adapters, seed=5, progress=lambda done, total: seen.append((done, total)), **FEW)
    assert one == analyze(adapters, seed=5, **FEW) != analyze(adapters, seed=6, **FEW)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two adapters with odd names, one much stronger, and of expert usage."""
    target = tmp_path_factory.mktemp("reports") / "report"
    layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"]
    usages = [
        ExpertUsage(name=name, layers=layers, weights=[[0.7, 0.3], [share, 1 - share]])
        for name, share in (("content", 0.2), ("style", 0.9))
    ]
    adapters = [blocks(0).scaled(9), blocks(1, header=False, rank=2)]
    with pytest.warns(QrloraWarning, match="times as strong"):
        report = analyze(adapters, names=["<script>dog", "ink & pen"], usages=usages, **FEW)
    assert write_report(report, target) == target / "report.html"
    return target


def test_report_folder(folder: Path) -> None:
    report = Report.model_validate_json((folder / "report.json").read_text())
    assert [facts.name for facts in report.adapters] == ["<script>dog", "ink & pen"]
    text = (folder / "report.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["format_version"] == 1
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert "pair-1-2-summary.png" in pictures
    assert "usage-1-2-difference.png" in pictures
    for name in pictures:
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.size[0] == 1040
    assert {path.suffix for path in folder.iterdir()} == {".png", ".json", ".html"}


def test_page_stands_alone(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;dog" in page
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s)>]{0,30})', page)
    assert len(sources) == len(list(folder.glob("*.png")))
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert re.search(r"https?:|//|@import", re.sub(r"data:[^\"]+", "", page)) is None
    assert 'name="viewport"' in page
    assert "Unequal strength" in page
    assert "ink &amp; pen" in page
    assert page.count("<figure>") == page.count('alt="')


def test_page_of_one_and_of_names_without_blocks(tmp_path: Path) -> None:
    write_report(analyze([made(0)], names=["dog"], **FEW), tmp_path / "one")
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert "dog by itself" in page
    assert not list((tmp_path / "one").glob("pair*"))


def test_reports_are_repeatable_bytes(folder: Path, tmp_path: Path) -> None:
    report = Report.model_validate_json((folder / "report.json").read_text())
    write_report(report, tmp_path / "again")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
