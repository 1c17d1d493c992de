"""Every verb on the folders of other families than FLUX: nothing above `models` knows which one it works on."""

import json
from pathlib import Path

import pytest
from PIL import Image

from qrlora.formats import read_adapter
from tests.cli.conftest import Run

COMPONENTS = {"sd3": "transformer", "sdxl": "unet", "qwen_image": "transformer", "z_image": "transformer"}
# The others have classifier-free guidance under its usual name, off at 1.
OWN_GUIDANCE = {"qwen_image": "true_cfg_scale"}
only_usual = pytest.mark.parametrize("family", ["sd3", "sdxl"])


@pytest.fixture(params=COMPONENTS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, request: pytest.FixtureRequest, desk: Path) -> str:
    """The name of the model in the working folder; relative, so that command lines have no blanks."""
    (desk / "model").symlink_to(request.getfixturevalue(f"tiny_{family}"))
    return "model"


def test_train_generate_and_the_rest(
    run: Run, model: str, family: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"train --model {model} --instance-data-dir dog.png --instance-prompt a_<c>_dog --output-dir dog"
    assert (
        run(f"{line} --max-train-steps 2 --learning-rate 0.1 --validation-prompt a_<c>_cat --gradient-checkpointing")
        == 0
    )
    adapter = read_adapter(desk / "dog" / "adapter.safetensors")
    assert adapter.component == COMPONENTS[family]
    assert adapter.header is not None
    assert adapter.header.base_model == f"tiny-{family}".replace("_", "-")
    assert (desk / "dog" / "validation" / "step-000002-0.png").is_file()

    guide = OWN_GUIDANCE.get(family, "guidance_scale")
    words = f"--model {model} --prompt a_<c>_dog --adapter dog/adapter.safetensors --negative-prompt cat"
    assert run(f"generate {words} --{guide.replace('_', '-')} 3 --output one.png") == 0
    assert run("generate --from one.png --output two.png") == 0
    assert "identical" in capsys.readouterr().err
    assert run("inspect --json one.png") == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    other = ({"guidance_scale", "true_cfg_scale"} - {guide}).pop()
    assert (settings[guide], settings[other], settings["negative_prompt"]) == (3.0, 1.0, "cat")
    assert run(f"generate --model {model} --prompt a_<c>_dog --output base.png") == 0
    with Image.open("one.png") as one, Image.open("base.png") as base:
        assert one.tobytes() != base.tobytes()

    capsys.readouterr()
    assert run("inspect --json dog/adapter.safetensors") == 0
    assert json.loads(capsys.readouterr().out)["component"] == COMPONENTS[family]
    assert run("export dog/adapter.safetensors --format kohya --output kohya.safetensors") == 0
    assert run("export kohya.safetensors --output back.safetensors") == 0
    assert read_adapter(desk / "back.safetensors").layers.keys() == adapter.layers.keys()
    assert run(f"basis --model {model} --rank 2") == 0
    assert run(f"analyze dog/adapter.safetensors back.safetensors --model {model} --draws 2 --output report") == 0


def test_blend(run: Run, model: str, family: str, desk: Path) -> None:
    guide = OWN_GUIDANCE.get(family, "guidance_scale")
    line = (
        f"blend --model {model} --content dog.png --content-prompt a_<c>_dog --style ink.png --style-prompt a_<s>_cat "
        "--prompt a_<c>_dog_in_<s> --max-train-steps 2 --learning-rate 0.1 --content-weights 0 1 --style-weights 0 1 "
        f"--{guide.replace('_', '-')} 2.5 --negative-prompt cat --output out"
    )
    assert run(line) == 0
    pictures = desk / "out" / "pictures"
    with Image.open(pictures / "merge-0-0.png") as corner, Image.open(pictures / "base.png") as base:
        assert corner.tobytes() == base.tobytes()
    with Image.open(pictures / "merge-1-1.png") as corner, Image.open(pictures / "merged.png") as merged:
        assert corner.tobytes() == merged.tobytes() != base.tobytes()
    report = json.loads((desk / "out" / "report.json").read_text())
    assert report["settings"][guide] == 2.5
    assert read_adapter(desk / "out" / "merged.safetensors").component == COMPONENTS[family]
    assert run("generate --from out/pictures/merge-1-1.png --output again.png") == 0


@only_usual
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--true-cfg-scale 2", "--true-cfg-scale 2.0 has no meaning for {}, whose classifier-free guidance is"),
        ("--max-sequence-length 600", "--max-sequence-length 600 is not possible for {}"),
        ("--guidance-scale 1 --negative-prompt cat", "--negative-prompt has no effect at a guidance_scale of 1.0; set"),
        ("--height 36", "height=36 must be a multiple of"),
    ],
)
def test_settings_that_mean_nothing_are_told(
    run: Run, model: str, family: str, words: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"generate --model {model} --prompt cat {words}") == 2
    assert expected.format(family) in capsys.readouterr().err


@only_usual
@pytest.mark.filterwarnings("default:guidance_scale=3.5 has no effect")
def test_a_guidance_embedding_that_is_not_there_is_told(
    run: Run, model: str, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"train --model {model} --instance-data-dir dog.png --instance-prompt a_<c>_dog --output-dir dog"
    assert run(f"{line} --max-train-steps 1 --guidance-scale 3.5") == 0
    assert f"guidance_scale=3.5 has no effect on the training: tiny-{family} has no" in capsys.readouterr().err
