"""Each verb does its work."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageChops

from qrlora.blend import Provenance
from qrlora.blend.provenance import save_picture
from qrlora.formats import read_adapter
from qrlora.training import Interrupted, TrainConfig
from tests.cli.conftest import Run


def test_blend(run: Run, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "blend --content dog.png --content-prompt a_<c>_dog --style ink.png --style-prompt a_cat_in_<s> "
        "--prompt a_<c>_dog_in_<s> --max-train-steps 1 --content-weights 1 --style-weights 0.5 1 --output out"
    )
    assert run(line) == 0
    said = capsys.readouterr()
    assert said.out.split() == [
        f"out/{name}"
        for name in ("blend.png", "content.safetensors", "style.safetensors", "merged.safetensors", "report.json")
    ]
    assert "done (load" in said.err
    assert run(line) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(f"{line} --overwrite") == 0
    capsys.readouterr()
    assert run("inspect out/blend.png") == 0
    assert "pictures/merged.png" in capsys.readouterr().out


def test_stopped_blend_says_how_to_continue(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_config: object) -> None:
        raise Interrupted(3, Path("out/checkpoint-3"), 2)

    monkeypatch.setattr("qrlora.blend.blend", stop)
    assert run("blend --overwrite") == 130
    said = capsys.readouterr().err
    assert "run the same command with --resume instead of --overwrite to continue" in said
    assert "latest" not in said


def test_train_takes_a_file_and_options_above_it(run: Run, desk: Path) -> None:
    Path("c.yaml").write_text("instance_data_dir: dog.png\noutput_dir: a\nmax_train_steps: 9\nadapter: {rank: 3}\n")
    assert run("train c.yaml --max_train_steps 1 --instance-prompt=a_<c> --adapter.basis svd --random-flip") == 0
    config = TrainConfig.from_yaml(desk / "a" / "config.yaml")
    assert (config.max_train_steps, config.instance_prompt, config.random_flip) == (1, "a <c>", True)
    assert (config.adapter.rank, config.adapter.basis) == (3, "svd")


def test_train_again_needs_overwrite(run: Run, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = adapter.read_bytes()
    line = "train --instance-data-dir dog.png --instance-prompt a_<c>_dog --output-dir dog --max-train-steps 1"
    assert run(line) == 2
    assert adapter.read_bytes() == before
    assert run(f"{line} --overwrite") == 0


def test_merge(run: Run, adapter: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge dog/adapter.safetensors dog/adapter.safetensors --weights 0.9 -0.4 --output m.safetensors") == 0
    assert "merged by sum: rank 4" in capsys.readouterr().err
    one, both = read_adapter(adapter), read_adapter(desk / "m.safetensors")
    for name, pair in both.layers.items():
        torch.testing.assert_close(pair.delta(), 0.5 * one.layers[name].delta())
    assert run("merge dog/adapter.safetensors --output folder --save-dtype bf16") == 0
    assert (desk / "folder" / "adapter_model.safetensors").stat().st_size < (desk / "m.safetensors").stat().st_size
    assert (desk / "folder" / "adapter_config.json").is_file()
    assert run("merge dog/adapter.safetensors --output m.safetensors") == 2


@pytest.mark.filterwarnings("ignore:the merge by svd was cut")
def test_merge_methods_take_options(run: Run, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "merge dog/adapter.safetensors dog/adapter.safetensors --method svd --output cut.safetensors"
    assert run(f"{command} --option rank=2") == 0
    assert "merged by svd: rank 2" in capsys.readouterr().err
    for option, message in [
        ("rank", "--option rank: write NAME=VALUE"),
        ("rank=[1]", "is no number and no word"),
        ("rank=many", "rank='many' is not valid"),
        ("density=0.3", "has no option 'density'"),
    ]:
        assert run(f"{command} --overwrite --option {option}") == 2
        assert message in capsys.readouterr().err


def test_merge_tells_norms_and_makes_them_equal(
    run: Run, adapter: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_adapter(adapter).scaled(2.5).save(desk / "loud.safetensors")
    capsys.readouterr()
    assert run("merge dog/adapter.safetensors loud.safetensors --output a.safetensors") == 0
    assert "ratio 2.5" in capsys.readouterr().err
    assert run("merge dog/adapter.safetensors loud.safetensors --normalize --output b.safetensors") == 0
    assert "ratio 1\n" in capsys.readouterr().err
    header = read_adapter(desk / "b.safetensors").header
    assert header is not None
    assert header.merged_from is not None
    one, two = (part["scale"] for part in header.merged_from)
    assert one / two == pytest.approx(2.5)


def test_generate_and_repeat(run: Run, adapter: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--adapter dog/adapter.safetensors=0.9 --adapter dog/adapter.safetensors"
    assert run(f"generate --prompt a_<c>_dog {words} --seed 5 --num-inference-steps 3 --output a/x.png") == 0
    assert run("generate --from a/x.png --output b/y.png") == 0
    assert "identical" in capsys.readouterr().err
    with Image.open("a/x.png") as one, Image.open("b/y.png") as two:
        assert ImageChops.difference(one, two).getbbox() is None
    assert run("generate --prompt a_<c>_dog --num-images 2 --seed 4 --output n.png") == 0
    assert {path.name for path in desk.glob("n-*.png")} == {"n-0.png", "n-1.png"}


def test_a_batch_size_without_a_list_is_refused(run: Run, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate --prompt a_<c>_dog --batch-size 2 --output x.png") == 2
    assert "--batch-size is for pictures of a list; give --jobs FILE" in capsys.readouterr().err
    assert not (desk / "x.png").exists()


def test_repeat_is_refused_when_its_parts_have_changed(
    run: Run, adapter: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate --prompt a_<c>_dog --adapter dog/adapter.safetensors --output x.png") == 0
    read_adapter(adapter).scaled(2.0).save(adapter)
    assert run("generate --from x.png --output y.png") == 2
    assert "has changed since" in capsys.readouterr().err
    assert run("generate --from x.png --output x.png --overwrite") == 2
    assert not (desk / "y.png").exists()


def test_repeat_is_refused_on_another_base(
    run: Run, desk: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny_pipelines import save_flux

    other = save_flux(tmp_path_factory.mktemp("other") / "flux", seed=1)
    capsys.readouterr()
    assert run("generate --prompt a_<c>_dog --output x.png") == 0
    assert run(f"generate --from x.png --output y.png --model {other}") == 2
    assert "another base model" in capsys.readouterr().err


def test_repeat_names_the_memory_option_where_the_weights_were_quantised(
    run: Run, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chunk = Provenance(
        prompt="a",
        seed=0,
        model=None,
        model_hash="0",
        settings={},
        device="cpu",
        dtype="float32",
        quantization="nf4",
    )
    save_picture(Image.new("RGB", (8, 8)), Path("x.png"), chunk)
    assert run("generate --from x.png --output y.png") == 2
    said = capsys.readouterr().err
    assert "was made with weights in nf4" in said
    assert "give the same --memory" in said


def _picture_of(model: str | None, path: Path) -> Path:
    """A picture that says it was made with `model`."""
    chunk = Provenance(prompt="a", seed=0, model=model, model_hash="0", settings={}, device="cpu", dtype="float32")
    return save_picture(Image.new("RGB", (8, 8)), path, chunk)


@pytest.mark.parametrize("model", ["nobody/nothing-here", "/nowhere/model", "a; echo $HOME", "\x1b[2J"])
def test_no_model_is_fetched_on_a_pictures_word(
    run: Run, desk: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qrlora.models.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    _picture_of(model, Path("x.png"))
    assert run("generate --from x.png --output y.png") == 2
    said = capsys.readouterr().err
    assert f"x.png names the model {model!r}" in said
    assert "add --model " in said
    assert "\x1b" not in said
    assert said.count("\n") == 1


def test_a_pictures_model_is_announced_and_found_from_anywhere(
    run: Run, desk: Path, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "model").symlink_to(tiny_flux)
    assert run("generate --prompt a_<c>_dog --model model --output x.png") == 0
    (desk / "elsewhere").mkdir()
    monkeypatch.chdir(desk / "elsewhere")
    capsys.readouterr()
    assert run("generate --from ../x.png --output y.png") == 0
    said = capsys.readouterr().err
    assert said.startswith(f"model named in ../x.png: {str(tiny_flux)!r}\n")
    assert "identical" in said


def test_a_validation_picture_is_told_from_others(run: Run, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "train --instance-data-dir dog.png --instance-prompt a_<c>_dog --output-dir dog --max-train-steps 1"
    assert run(f"{line} --validation-prompt a_<c>_cat") == 0
    capsys.readouterr()
    picture = "dog/validation/step-000001-0.png"
    assert run(f"generate --from {picture} --output y.png") == 2
    said = capsys.readouterr().err
    assert f"{picture} is a validation picture of a training at step 1" in said
    assert said.count("\n") == 1
    assert run(f"inspect {picture} --json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["prompt"], facts["step"], facts["model"]) == ("a <c> cat", 1, "tiny-flux")


@pytest.fixture
def coefficients(adapter: Path, desk: Path) -> Path:
    return read_adapter(adapter).save(desk / "small.safetensors", coefficients_only=True)


def test_inspect_of_coefficients_alone(run: Run, coefficients: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("inspect small.safetensors") == 0
    shown = capsys.readouterr().out
    assert "coefficients only: needs the base to be used" in shown
    assert "fingerprint" in shown
    assert run("inspect small.safetensors --json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert run("inspect dog/adapter.safetensors --json") == 0
    whole = json.loads(capsys.readouterr().out)
    for key in ("rank", "layers", "trained", "header", "component"):
        assert facts[key] == whole[key], key


def test_merge_of_coefficients_alone(
    run: Run, adapter: Path, coefficients: Path, desk: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = read_adapter(adapter)
    for extra in ("", f" --model {tiny_flux}"):  # its header names the embedded base
        assert run(f"merge small.safetensors dog/adapter.safetensors --output m.safetensors --overwrite{extra}") == 0
        assert "its bases are computed again on tiny-flux" in capsys.readouterr().err
        for name, pair in read_adapter(desk / "m.safetensors").layers.items():
            torch.testing.assert_close(pair.delta(), 2 * one.layers[name].delta(), rtol=1e-4, atol=1e-6)
    assert one.header is not None
    header = one.header.model_copy(update={"base_model": "nobody/nothing-here"})
    replace(one, header=header).save(coefficients, coefficients_only=True)
    assert run("merge small.safetensors --output n.safetensors") == 2
    said = capsys.readouterr().err
    assert "small.safetensors holds coefficients only" in said
    assert "'nobody/nothing-here'" in said
    assert "give it with --model" in said
    assert not (desk / "n.safetensors").exists()


def test_inspect(run: Run, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("inspect dog/adapter.safetensors") == 0
    shown = capsys.readouterr().out
    assert "basis" in shown
    assert '["<c>"]' in shown
    assert run("inspect dog/adapter.safetensors --json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rank"] == 4
    assert facts["header"]["training"]["captions"] == ["a <c> dog"]
    assert facts["update_norm"] > 0
    assert run("generate --prompt a_<c>_dog --seed 3 --output x.png") == 0
    capsys.readouterr()
    assert run("inspect x.png --json") == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 3


def test_basis_fills_the_cache(
    run: Run, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qrlora.adapter import BasisCache

    BasisCache.forget()
    monkeypatch.setenv("QRLORA_CACHE", str(desk / "cache"))
    assert run("basis --rank 3 --target-modules attn.to_q attn.to_v") == 0
    # one double and one single block
    assert len(list((desk / "cache").glob("*.safetensors"))) == 4
    assert "4 bases of rank 3" in capsys.readouterr().err
    BasisCache.forget()


def test_config_init_is_valid_and_at_the_defaults(run: Run, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config init a.yaml") == 0
    assert run("config init a.yaml") == 2
    assert run("config check a.yaml --resolve") == 0
    written = TrainConfig.from_yaml(desk / "a.yaml")
    assert written == TrainConfig(instance_data_dir="pictures/dog.png", output_dir="out/dog")
    lines = (desk / "a.yaml").read_text().splitlines()
    keys = set(yaml.safe_load("\n".join(lines)))
    assert keys == set(TrainConfig.model_fields)
    assert max(map(len, lines)) <= 120


def test_config_check_tells_every_bad_file(run: Run, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text("instance_data_dir: a\noutput_dir: b\nmax_train_stps: 4\n")
    Path("b.yaml").write_text("instance_data_dir: a\noutput_dir: b\nadapter: {rnk: 4}\n")
    assert run("config check a.yaml b.yaml") == 2
    said = capsys.readouterr().err
    assert "did you mean max_train_steps?" in said
    assert "did you mean adapter.rank?" in said
