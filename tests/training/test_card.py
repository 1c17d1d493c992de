"""The model card of a finished run: readable by the hub's own tools, and its recipes do what they say."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image, ImageChops

from qrlora.adapter import attach_adapter
from qrlora.cli import main
from qrlora.errors import QrloraWarning
from qrlora.formats import read_adapter
from qrlora.models import LoadedModel, load_pipeline
from qrlora.training import train
from qrlora.training.card import MARK, CardFacts, card_text
from tests.tiny_newer import save_flux2_klein
from tests.training.conftest import MakeConfig


def _card(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md")


def _code(card: Any, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", card.text, re.DOTALL)
    assert found is not None
    return found[1]


def test_a_card_tells_what_it_is_and_shows_pictures(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    options = {"validation_prompt": "a <c> cat", "num_validation_images": 2, "use_ema": True, "min_timestep": 500}
    train(make_config(**options), loaded=model, progress=False)
    card = _card(tmp_path / "out")
    data = card.data.to_dict()
    assert data["tags"] == ["text-to-image", "diffusers", "lora", "qr-lora", "flux", "template:sd-lora"]
    assert data["instance_prompt"] == "a <c> dog"
    assert "base_model" not in data  # a folder here, which is no name of the hub
    shown = [f"validation/step-000006-{index}.png" for index in (0, 1)]
    assert data["widget"] == [{"text": "a <c> cat", "output": {"url": url}} for url in shown]
    for url in shown:
        assert (tmp_path / "out" / url).is_file()
        assert f"![a \\<c\\> cat]({url})" in card.text
    for words in (
        "`<c>`",
        "tiny-flux",
        "| `max_train_steps` | `6` |",
        "| `use_ema` | `True` |",
        "The licence of `tiny-flux`",
    ):
        assert words in card.text
    assert "trained at timesteps 500-1000 alone" in card.text
    assert "adapter.safetensors=1@500-1000" in _code(card, "sh")
    assert str(tmp_path) not in card.content


def test_its_recipes_make_the_validation_picture(
    make_config: MakeConfig, tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock diffusers by the Python in the card, and qrlora by its command, on a base in a folder."""
    train(make_config(validation_prompt="a <c> cat", learning_rate=0.3), progress=False)
    folder = tmp_path / "out"
    expected = Image.open(folder / "validation" / "step-000006-0.png").convert("RGB")
    card = _card(folder)
    monkeypatch.chdir(folder)
    code = _code(card, "python").replace("PATH/TO/tiny-flux", str(tiny_flux))
    seeded = code.replace(").images", ", generator=torch.Generator().manual_seed(0)).images")
    assert seeded != code
    exec(seeded, {})
    picture = Image.open(folder / "picture.png").convert("RGB")
    assert max(high for _, high in ImageChops.difference(picture, expected).getextrema()) <= 1
    command = shlex.split(_code(card, "sh").replace("PATH/TO/tiny-flux", str(tiny_flux)))
    assert command[0] == "qrlora"
    assert main([*command[1:], "--overwrite"]) == 0
    made = Image.open(folder / "picture.png").convert("RGB")
    assert ImageChops.difference(made, expected).getbbox() is None


def test_within_a_range_the_command_makes_the_validation_picture(
    make_config: MakeConfig, tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: list[Image.Image] = []
    for low in (0, 600):
        folder = tmp_path / str(low)
        options = {"validation_prompt": "a <c> cat", "learning_rate": 0.3, "output_dir": str(folder)}
        train(make_config(min_timestep=low, **options), progress=False)
        pictures.append(Image.open(folder / "validation" / "step-000006-0.png").convert("RGB"))
    monkeypatch.chdir(folder)
    command = shlex.split(_code(_card(folder), "sh").replace("PATH/TO/tiny-flux", str(tiny_flux)))
    assert "adapter.safetensors=1@600-1000" in command
    assert main(command[1:]) == 0
    made = Image.open("picture.png").convert("RGB")
    assert ImageChops.difference(made, pictures[1]).getbbox() is None
    whole = [part.replace("@600-1000", "") for part in command[1:]]
    assert main([*whole, "--overwrite"]) == 0
    assert ImageChops.difference(Image.open("picture.png").convert("RGB"), pictures[1]).getbbox() is not None
    assert main(["inspect", "validation/step-000006-0.png"]) == 0


def test_the_users_own_readme_stays(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    readme = tmp_path / "out" / "README.md"
    readme.parent.mkdir()
    readme.write_text("mine")
    with pytest.warns(QrloraWarning, match=r"README\.md is not of qrlora and stays as it is"):
        train(make_config(max_train_steps=1), loaded=model, progress=False)
    assert readme.read_text() == "mine"
    train(make_config(max_train_steps=1, overwrite=True), loaded=model, progress=False)
    assert MARK in readme.read_text()
    (tmp_path / "out" / "adapter.safetensors").unlink()
    train(make_config(max_train_steps=2, checkpointing_steps=1), loaded=model, progress=False)
    assert "| `max_train_steps` | `2` |" in readme.read_text()


@pytest.mark.parametrize(
    ("adapter", "tag", "stock"),
    [
        ({"basis": "lora"}, False, True),
        ({"basis": "dora"}, False, True),
        ({"form": "gated", "experts": 2}, True, False),
    ],
    ids=["lora", "dora", "gated"],
)
def test_a_file_that_is_more_than_a_lora_is_said_to_be(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, adapter: dict[str, Any], tag: bool, stock: bool
) -> None:
    train(make_config(adapter=adapter, max_train_steps=1), loaded=model, progress=False)
    card = _card(tmp_path / "out")
    assert ("qr-lora" in card.data.tags) is tag
    assert ("load_lora_weights" in card.text) is stock
    assert ("qrlora alone reads it" in card.text) is not stock
    assert "widget" not in card.data.to_dict()


def test_the_base_is_named_as_it_can_be_found(make_config: MakeConfig, model: LoadedModel) -> None:
    """A hub id in the metadata and the code; the base that comes with qrlora by its path."""

    from qrlora import starter
    from qrlora.adapter import AdapterSpec, adapter_of, add_adapter, remove_adapter

    add_adapter(model.denoiser, AdapterSpec(rank=2), "other")
    adapter = adapter_of(model.denoiser, "other")
    remove_adapter(model.denoiser, "other")
    config = make_config(mixed_precision="bf16", resolution=32)
    captions = ["a `<c>` dog | of\n\"mine\" and 'yours'"]
    hub = replace(model, source="somebody/Model.1", model_id="somebody/Model.1")
    text = card_text(CardFacts(config, hub, adapter, captions, [], "me/dog"))
    card = ModelCard(text)
    assert card.data.to_dict()["base_model"] == "somebody/Model.1"
    assert card.data.to_dict()["instance_prompt"] == captions[0]
    code = _code(card, "python")
    compile(code, "card", "exec")
    assert "FluxPipeline.from_pretrained('somebody/Model.1', dtype=torch.bfloat16).to('cpu')" in code
    assert "load_lora_weights('me/dog', weight_name='adapter.safetensors')" in code
    assert shlex.split(_code(card, "sh"))[-3] == captions[0]
    embedded = card_text(CardFacts(config, replace(model, source=str(starter.path())), adapter, captions, []))
    assert "from_pretrained(starter.path(), " in embedded
    assert "--model" not in embedded


def test_klein_is_told_what_it_is_guided_away_from_as_embeddings(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    klein = load_pipeline(save_flux2_klein(tmp_path / "klein"))
    negative = klein.defaults.model_copy(update={"negative_prompt": "a dog"})
    config = make_config(model=str(tmp_path / "klein"))
    train(config, loaded=replace(klein, defaults=negative), progress=False)
    monkeypatch.chdir(tmp_path / "out")
    code = _code(_card(tmp_path / "out"), "python").replace("PATH/TO/tiny-flux2-klein", str(tmp_path / "klein"))
    exec(code.replace(").images", ", generator=torch.Generator().manual_seed(3)).images"), {})
    attach_adapter(klein.denoiser, read_adapter("adapter.safetensors"), "content")
    (ours,) = klein.family.generate(klein.pipeline, ["a <c> dog"], seeds=[3], **negative.model_dump())
    with Image.open("picture.png") as made:
        differences = ImageChops.difference(made.convert("RGB"), ours).getextrema()
    assert max(high for _, high in differences) <= 1
