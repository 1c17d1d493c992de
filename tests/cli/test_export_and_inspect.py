"""`qrlora export` converts between tools, and `qrlora inspect` tells what a file is, whoever made it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qrlora.cli import main
from qrlora.formats import read_adapter, write_adapter
from tests.adapters_of_data import dense, with_words
from tests.published_files import FLUX, SD3, qr_parts, stored
from tests.real_layers import assert_same_updates, real_adapter, save


@pytest.fixture
def kohya(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_adapter(real_adapter("flux", "attn.to_q", "ff.net.2"), tmp_path / "k.safetensors", "kohya")


def facts(capsys: pytest.CaptureFixture[str], line: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", *line.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("format", ["diffusers", "comfy", "peft", "kohya"])
def test_export(kohya: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = "out" if format == "peft" else "out.safetensors"
    line = ["export", "k.safetensors", "--format", format, "--output", output]
    assert main(line) == 0
    said = capsys.readouterr()
    assert said.out.strip() == output
    assert "read as kohya sd-scripts: 18 keys start with lora_unet_" in said.err
    assert "18 keys matched, 0 left out, 6 layers" in said.err
    assert_same_updates(read_adapter(output), real_adapter("flux", "attn.to_q", "ff.net.2").layers)
    assert main(line) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*line, "--overwrite", "--save-dtype", "bf16"]) == 0
    assert facts(capsys, output)["layers"] == 6


def test_export_at_a_rank(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error told is that of the dense updates' own truncated SVDs, in float64."""
    assert main(["export", "k.safetensors", "--rank", "1", "--output", "one.safetensors"]) == 0
    told = float(capsys.readouterr().err.split("relative error ")[1].split()[0])
    dense = [pair.delta().double() for pair in read_adapter("k.safetensors").layers.values()]
    values = [torch.linalg.svdvals(update) for update in dense]
    lost, total = (sum(float(v[i:].square().sum()) for v in values) for i in (1, 0))
    assert told == pytest.approx((lost / total) ** 0.5, rel=1e-2)
    assert {pair.rank for pair in read_adapter("one.safetensors").layers.values()} == {1}
    assert main(["export", "k.safetensors", "--rank", "0", "--output", "none.safetensors"]) == 2


def test_bad_outputs_are_refused_before_anything_is_read(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "none", "--output", "a.bin"]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    assert main(["export", "none", "--format", "peft", "--output", "a.safetensors"]) == 2
    assert "must be a folder" in capsys.readouterr().err


def test_what_is_not_understood(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"lora_te1_x.lora_up.weight": torch.ones(2), "diffusion_model.img_in.lora_A.weight": torch.ones(2, 4)}
    save({**tensors, "diffusion_model.img_in.lora_B.weight": torch.ones(4, 2)}, Path("c.safetensors"))
    assert main(["export", "c.safetensors", "--output", "d.safetensors"]) == 2
    assert "lora_te1_x.lora_up.weight; allow_unmatched=True (qrlora export --allow-" in capsys.readouterr().err
    assert main(["export", "c.safetensors", "--output", "d.safetensors", "--allow-unmatched"]) == 0
    assert "left out: lora_te1_x.lora_up.weight" in capsys.readouterr().err
    assert main(["inspect", "c.safetensors"]) == 0
    assert "lora_te1_x.lora_up.weight" in capsys.readouterr().out


def test_the_forks_files(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = qr_parts(SD3, 1, upper=True)
    save(stored(parts), Path("f.safetensors"))
    assert main(["export", "f.safetensors", "--output", "g.safetensors"]) == 2
    assert "--basis" in capsys.readouterr().err
    assert main(["export", "f.safetensors", "--output", "g.safetensors", "--basis", "svd"]) == 0
    assert_same_updates(
        read_adapter("g.safetensors"), {name: q.double() @ r.double() for name, (q, r, _) in parts.items()}
    )
    found = facts(capsys, "f.safetensors")
    assert found["format"] == "QR-LoRA fork for Stable Diffusion 3"
    assert "do not say which basis" in found["unread"]
    assert facts(capsys, "f.safetensors --basis qr --lora-alpha 6")["header"]["basis"] == "qr"


def test_q_and_r_trained_together_need_their_model(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = "transformer_blocks.0.attn.to_out.0"
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    Path("model/transformer").mkdir(parents=True)
    save({f"{layer}.weight": weight}, Path("model/transformer/diffusion_pytorch_model.safetensors"))
    U, S, Vh = torch.linalg.svd(weight)
    B, A = U[:, :2], S[:2, None] * Vh[:2]
    names = {"up": 1.5 * B, "down": A}
    save(
        {f"transformer.{layer}.to_out.0.lora.{name}.weight": tensor for name, tensor in names.items()},
        Path("q.safetensors"),
    )
    assert main(["export", "q.safetensors", "--output", "r.safetensors"]) == 2
    assert "give base= (qrlora export --model)" in capsys.readouterr().err
    assert main(["export", "q.safetensors", "--output", "r.safetensors", "--model", "model"]) == 0
    got = read_adapter("r.safetensors").layers[layer].delta()
    torch.testing.assert_close(got, 0.5 * B @ A, rtol=0, atol=1e-5)
    assert facts(capsys, "q.safetensors")["layers"] == 1
    assert facts(capsys, "q.safetensors --model model")["rank"] == 4


def test_inspect_shows_blocks_or_layers(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "k.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "kohya sd-scripts" in shown
    assert "network_module" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith(("transformer_blocks", "single_"))]
    assert [row[0] for row in rows] == [f"{kind}transformer_blocks.{n}" for kind in ("single_", "") for n in (0, 1)]
    assert rows[2][3] in ("attn.to_q", "ff.net.2")
    assert main(["inspect", "k.safetensors", "--layers"]) == 0
    layered = capsys.readouterr().out
    norms = facts(capsys, "k.safetensors")["norms"]
    adapter = read_adapter("k.safetensors")
    for name, norm in norms.items():
        assert norm == pytest.approx(float(adapter.layers[name].delta().norm()), rel=1e-5)
        assert name in layered
        assert f"{norm:.4g}" in layered
    block = sum(norms[f"transformer_blocks.0.{layer}"] ** 2 for layer in ("attn.to_q", "ff.net.2")) ** 0.5
    assert float(rows[2][2]) == pytest.approx(block, rel=1e-3)


def test_inspect_tells_everything_as_json(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, "k.safetensors")
    assert found["matched"]["lora_unet_single_blocks_0_linear1.alpha"].startswith(
        "single_transformer_blocks.0.attn.to_q"
    )
    assert found["unmatched"] == []
    assert found["header"] is None
    assert set(found["ranks"].values()) == {2}
    save(stored(qr_parts(FLUX, 1, upper=True)), Path("p.safetensors"), {"modelspec.trigger_phrase": "<c>"})
    published = facts(capsys, "p.safetensors")
    assert (published["format"], published["header"]["mask"]) == ("published QR-LoRA code", "upper")
    tensors = {"img_in.lora_A.weight": torch.ones(2, 4), "img_in.lora_B.weight": torch.ones(4, 2)}
    save(tensors, Path("t.safetensors"), {"modelspec.trigger_phrase": "<c> dog", "ss_base_model_version": "flux1"})
    assert facts(capsys, "t.safetensors")["trigger_words"] == "<c> dog"


def test_what_a_stranger_wrote_is_not_sent_to_the_terminal(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"img_in.lora_A.weight": torch.ones(2, 4), "img_in.lora_B.weight": torch.ones(4, 2)}
    save(tensors, Path("t.safetensors"), {"modelspec.title": "a\x1b[2Jb" * 1000})
    assert main(["inspect", "t.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"\x1b" in shown
    assert max(map(len, shown.splitlines())) < 400


def test_companions_are_shown_exported_and_merged(kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = replace(real_adapter("sdxl", "attn1.to_q"), companions=with_words(0, "text_encoder").companions)
    adapter.save("w.safetensors")
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    norm = float(dense(adapter.companions["text_encoder"], layer).norm())
    assert main(["inspect", "w.safetensors"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("text_encoder.")]
    assert [(row[0], row[1]) for row in rows] == [("text_encoder.text_model.encoder.layers.0", "3")]
    assert float(rows[0][2]) == pytest.approx(norm, rel=1e-3)
    found = facts(capsys, "w.safetensors")
    assert (found["component"], found["layers"]) == ("unet", len(adapter.layers))
    words = found["companions"]["text_encoder"]
    assert (words["layers"], words["trained"], words["header"]["basis"]) == (1, 30, "qr")
    assert words["norms"] == {layer: pytest.approx(norm, rel=1e-6)}
    assert main(["export", "w.safetensors", "--format", "kohya", "--output", "x.safetensors"]) == 0
    assert f"0 left out, {len(adapter.layers) + 1} layers" in capsys.readouterr().err
    assert_same_updates(
        read_adapter("x.safetensors").companions["text_encoder"], adapter.companions["text_encoder"].layers
    )
    assert main(["export", "w.safetensors", "--format", "peft", "--output", "folder"]) == 2
    assert "its adapter of text_encoder would be lost" in capsys.readouterr().err
    assert main(["merge", "w.safetensors", "w.safetensors", "--method", "concat", "--output", "y.safetensors"]) == 0
    assert f"rank 4, {len(adapter.layers)} layers, 1 of the text_encoder" in capsys.readouterr().err
