"""Lists of pictures: each is the one drawn alone, up to rounding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.adapter import AdapterSpec, adapter_of_pipeline, add_adapter, remove_from_pipeline
from qrlora.blend import Painter, Wish, paint_wishes, read_provenance, read_wishes
from qrlora.cli import main
from qrlora.errors import QrloraError
from qrlora.models import LoadedModel, load_pipeline


def saved(model: LoadedModel, path: Path, seed: int, *, words: bool = False) -> Path:
    """An adapter of random coefficients, large enough to see."""
    carriers = [model.denoiser, *([model.pipeline.text_encoder] if words else [])]
    for carrier in carriers:
        add_adapter(carrier, AdapterSpec(rank=2, mask="full", seed=seed), "made")
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in carrier.named_parameters():
            if parameter.requires_grad and "made" in key:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    adapter_of_pipeline(model.pipeline, "made").save(path)
    remove_from_pipeline(model.pipeline, "made")
    return path


@pytest.mark.parametrize("family", ["tiny_flux", "tiny_sd3"])  # guidance in two passes, and in one of twice the batch
def test_a_list_is_drawn_as_its_pictures_alone(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(family)
    model = load_pipeline(folder)
    one = str(saved(model, tmp_path / "one.safetensors", 1))
    two = str(saved(model, tmp_path / "two.safetensors", 2, words=True))
    painter = Painter(model, str(folder), model.defaults)
    wishes = [
        Wish(prompt="a dog", seed=3, adapters={one: 0.8}),
        Wish(prompt="a cat", seed=4, adapters={one: 1.0, two: -0.5}),
        Wish(prompt="a dog", seed=3),
        Wish(prompt="a dog", seed=3, adapters={two: 1.0, one: 0.0}, name="last"),
    ]
    files = [tmp_path / "drawn" / f"{number}.png" for number in range(4)]
    assert list(paint_wishes(painter, wishes, files, 3)) == files
    assert not any(module._forward_hooks for module in model.denoiser.modules())
    drawn = [np.asarray(Image.open(file)).astype(int) for file in files]
    for wish, file, picture in zip(wishes, files, drawn, strict=True):
        for name, path in enumerate(wish.adapters):
            painter.attach(f"part{name}", Path(path))
        weights = {f"part{name}": weight for name, weight in enumerate(wish.adapters.values())}
        alone = np.asarray(painter.paint(wish.prompt, wish.seed, weights, anew=True).image).astype(int)
        assert np.abs(alone - picture).max() <= 1
        for name in weights:
            painter.detach(name)
        about = read_provenance(file)
        assert (about.prompt, about.seed, about.together) == (wish.prompt, wish.seed, 1 if wish.name else 3)
        assert [use.weight for use in about.adapters] == [weight for weight in wish.adapters.values() if weight]
    assert min(np.abs(drawn[2] - drawn[number]).max() for number in (0, 3)) > 3


def test_lists_on_the_command_line(tiny_flux: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_pipeline(tiny_flux)
    adapter = saved(model, tmp_path / "one.safetensors", 1)
    listed = tmp_path / "pictures.jsonl"
    wishes = [{"prompt": "a dog", "adapters": {str(adapter): 0.5}, "name": "dog"}, {"prompt": "a cat", "seed": 1}]
    listed.write_text("\n".join(json.dumps(wish) for wish in wishes))
    options = ["--jobs", str(listed), "--model", str(tiny_flux), "--output", str(tmp_path / "drawn")]
    assert main(["generate", *options]) == 0
    drawn = [tmp_path / "drawn" / name for name in ("dog.png", "1.png")]
    assert capfd.readouterr().out.split() == [str(path) for path in drawn]
    assert main(["generate", *options]) == 2
    assert f"--output {drawn[0]} exists" in capfd.readouterr().err
    assert main(["generate", *options, "--prompt", "a dog"]) == 2
    assert "says all of each picture; drop --prompt" in capfd.readouterr().err
    for option in ("--method", "--option"):
        assert main(["generate", *options, option, "k-lora"]) == 2
        assert f"{option} chooses adapters anew at every step, which --jobs" in capfd.readouterr().err
    again = tmp_path / "again.png"
    assert main(["generate", "--from", str(drawn[0]), "--output", str(again)]) == 0
    said = capfd.readouterr().err
    assert "identical" in said or "it was drawn 2 at a time" in said


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.yaml", "- prompt: a dog\n- prompt: a cat\n  sed: 3\n", "picture number 2: sed is not valid"),
        ("a.yaml", "- seed: 3\n", "picture number 1: prompt is not valid"),
        ("a.yaml", "prompt: a dog\n", "a list of pictures is wanted"),
        ("a.yaml", "[]\n", "lists no pictures"),
        ("a.yaml", "[{", "is not what its name says"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', "is not what its name says"),
        ("a.yaml", "- {prompt: a, name: '1'}\n- prompt: b\n", "two pictures would be named 1"),
        ("a.yaml", "- {prompt: a, name: ../b}\n", "picture number 1: name is not valid"),
        ("a.yaml", "- {prompt: a, adapters: {x: heavy}}\n", "picture number 1: adapters.x is not valid"),
        ("a.yaml", "- {prompt: a, adapters: {x: .inf}}\n", "picture number 1: adapters.x is not valid"),
    ],
)
def test_lists_that_are_refused(name: str, text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(QrloraError, match=told):
        read_wishes(tmp_path / name)
    with pytest.raises(QrloraError, match="cannot be read"):
        read_wishes(tmp_path / "none.yaml")


def test_nothing_is_drawn_where_one_adapter_does_not_fit(tiny_flux: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    model = load_pipeline(tiny_flux)
    fits = saved(model, tmp_path / "one.safetensors", 1)
    other = saved(load_pipeline(tiny_sd3), tmp_path / "two.safetensors", 2)
    painter = Painter(model, str(tiny_flux), model.defaults)
    wishes = [Wish(prompt="a", adapters={str(fits): 1.0}), Wish(prompt="b", adapters={str(other): 1.0})]
    files = [tmp_path / "1.png", tmp_path / "2.png"]
    with pytest.raises(QrloraError, match=r"two\.safetensors adapts .* does not have"):
        list(paint_wishes(painter, wishes, files, 1))
    assert not files[0].exists()
