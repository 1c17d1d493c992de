"""What would spoil a blend is told before anything is trained."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from qrlora.blend import BlendConfig, BlendResult, blend, roles, settings_of
from qrlora.blend.job import forget_pictures
from qrlora.blend.roles import agree_on_memory, fill_trainings, plan_parts
from qrlora.errors import QrloraError
from qrlora.formats import LowRank, read_adapter
from qrlora.models import GenerationDefaults, LoadedModel, load_pipeline
from qrlora.models.flux import FLUX
from qrlora.training import TrainConfig
from tests.blend.conftest import MakeConfig
from tests.tiny_newer import save_flux2_klein


def _refused_untrained(config: BlendConfig, model: LoadedModel, words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roles, "train", lambda *_, **__: pytest.fail("trained"))
        with pytest.raises(QrloraError, match=words):
            blend(config, loaded=model, progress=False)
    assert not config.output.exists()
    assert not getattr(model.denoiser, "peft_config", None)


def test_given_adapters_are_checked_before_the_training(
    made: BlendResult, make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    whole = read_adapter(made.style)
    assert whole.header is not None
    layer = next(iter(whole.layers))
    hashes = whole.header.weight_hashes | {layer: "float32:" + "0" * 32}
    other = replace(whole, header=whole.header.model_copy(update={"weight_hashes": hashes}))
    fewer = replace(whole, layers={name: pair for name, pair in whole.layers.items() if name != layer})
    wrong = replace(whole, layers={**whole.layers, layer: LowRank(torch.ones(3, 2), torch.ones(2, 3))})
    for adapter, words in (
        (other, rf"given\.safetensors was trained on another base model: the weight of {layer} differs"),
        (wrong, rf"given\.safetensors adapts {layer} as a weight of shape \[3, 3\]"),
        (fewer, rf"content training adapts {layer}, which .*given\.safetensors does not"),
    ):
        file = adapter.save(tmp_path / "given.safetensors")
        _refused_untrained(make_config(tmp_path / "out", style=None, style_adapter=(file,)), model, words)
        both = {"content": None, "content_adapter": (made.content,), "style": None, "style_adapter": (file,)}
        _refused_untrained(make_config(tmp_path / "out", **both), model, "safetensors")


def test_trainings_that_would_not_merge_are_not_begun(
    made: BlendResult, make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "style.yaml").write_text("adapter: {target_modules: [attn.to_q]}\n")
    config = make_config(tmp_path / "out", style_config=tmp_path / "style.yaml")
    _refused_untrained(config, model, r"content training adapts \S+, which the style training does not")
    config = make_config(tmp_path / "out", style=None, style_adapter=(made.style,), rank=3, method="sum")
    _refused_untrained(config, model, r"--method sum needs one basis, but .*rank 4.*rank 3; use --method concat")


def test_a_models_defaults_for_a_role_come_before_those_for_all(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    told = replace(model, training={"max_train_steps": 5}, roles={"style": {"max_train_steps": 3}})
    for given, expected in ((None, {"content": 5, "style": 3}), (7, {"content": 7, "style": 7})):
        parts, _ = plan_parts(make_config(tmp_path / "out", max_train_steps=given))
        fill_trainings(parts, told)
        steps = {role: part.training.max_train_steps for role, part in parts.items() if part.training is not None}
        assert steps == expected


@pytest.mark.parametrize(
    ("adapter", "changes", "basis"),
    [("{}", {}, "lora"), ("{}", {"basis": "svd"}, "svd"), ("{mask: full}", {}, "qr"), ("{experts: 2}", {}, "qr")],
)
def test_a_models_own_basis_stands_only_where_nothing_of_another_is_told(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, adapter: str, changes: dict[str, str], basis: str
) -> None:
    own = replace(model, roles={"content": {"basis": "lora"}, "style": {"basis": "lora"}})
    (tmp_path / "more.yaml").write_text(f"adapter: {adapter}\n")
    parts, _ = plan_parts(make_config(tmp_path / "out", content_config=tmp_path / "more.yaml", **changes))
    fill_trainings(parts, own)
    content = parts["content"].training
    assert content is not None
    assert content.adapter.basis == basis


@pytest.mark.parametrize(("data", "output"), [("out/pics", "out"), ("out", "out")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_folder_in_the_output_is_refused(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, data: str, output: str, overwrite: bool
) -> None:
    (tmp_path / data).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / data / "a.png")
    config = make_config(tmp_path / output, style=tmp_path / data, overwrite=overwrite)
    with pytest.raises(QrloraError, match=r"--style .* or lies in it; name an output folder elsewhere"):
        blend(config, loaded=model, progress=False)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.png"]


@pytest.mark.parametrize("name", ["pictures/content.png", "pictures/merge-1-1.png", "sweep.png"])
def test_a_first_blend_spares_inputs(make_config: MakeConfig, model: LoadedModel, tmp_path: Path, name: str) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / name)
    with pytest.raises(QrloraError, match="is among the files that this blend replaces"):
        blend(make_config(tmp_path, style=tmp_path / name), loaded=model, progress=False)
    assert (tmp_path / name).is_file()


def test_only_our_own_earlier_pictures_are_removed(made: BlendResult, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    ours = shutil.copy(next((made.content.parent / "pictures").glob("merge-*.png")), tmp_path / "pictures")
    theirs = tmp_path / "pictures" / "merge-of-two-roads.png"
    Image.new("RGB", (8, 8)).save(theirs)
    forget_pictures(tmp_path)
    assert theirs.is_file()
    assert not Path(ours).exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"guidance_scale": float("nan")}, "--guidance-scale nan is not valid"),
        ({"max_sequence_length": 0}, "--max-sequence-length 0 is not valid"),
    ],
)
def test_settings_are_validated_where_they_meet(given: dict, words: str) -> None:
    model = LoadedModel(None, FLUX, "a model", GenerationDefaults())
    with pytest.raises(QrloraError, match=words):
        settings_of(SimpleNamespace(**given), model.defaults, model)
    assert settings_of(SimpleNamespace(height=64), GenerationDefaults(width=32), model).model_dump() == (
        GenerationDefaults(width=32, height=64).model_dump()
    )


def test_guidance_of_a_distilled_model_is_refused_before_it_is_trained(make_config: MakeConfig, tmp_path: Path) -> None:
    distilled = load_pipeline(save_flux2_klein(tmp_path / "klein", distilled=True))
    words = r"--guidance-scale 2\.5 has no effect on this model, which was distilled to do without; leave it at 1"
    _refused_untrained(make_config(tmp_path / "out", guidance_scale=2.5), distilled, words)


def test_what_the_configurations_say_of_the_model(make_config: MakeConfig, tmp_path: Path) -> None:
    content, style, output = tmp_path / "content.yaml", tmp_path / "style.yaml", tmp_path / "out"
    content.write_text("model: somebody/some-model\nmemory: 12gb\n", encoding="utf-8")
    style.write_text("memory: 24gb\n", encoding="utf-8")
    with pytest.raises(QrloraError, match=r"content.yaml names the model somebody/some-model, .* give --model some"):
        blend(make_config(output, content_config=content, model=None), progress=False)
    content.write_text("memory: 12gb\n", encoding="utf-8")
    with pytest.raises(QrloraError, match="ask for memory 12gb and 24gb; give both one with --memory"):
        blend(make_config(output, content_config=content, style_config=style), progress=False)
    style.write_text("quantization: nf4\n", encoding="utf-8")
    with pytest.raises(QrloraError, match="quantization stands in --content-config or --style-config, but the model"):
        blend(make_config(output, style_config=style), progress=False)
    assert not output.exists()


def test_both_trainings_get_what_the_configurations_say(make_config: MakeConfig, tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("memory: 12gb\nseed: 7\n", encoding="utf-8")
    config = make_config(tmp_path / "out", content_config=more)
    parts, _ = plan_parts(config)
    assert agree_on_memory(config, parts) == "12gb"
    trainings = [part.training for part in parts.values() if part.training is not None]
    assert [training.memory for training in trainings] == ["12gb", "12gb"]
    assert [training.seed for training in trainings] == [7, 0]
    given = make_config(tmp_path / "out", content_config=more, seed=3)
    assert [part.training.seed for part in plan_parts(given)[0].values() if part.training is not None] == [3, 3]


@pytest.mark.filterwarnings("ignore")  # bitsandbytes and torchao speak on import and on a CPU
def test_a_blend_keeps_the_model_as_its_configurations_say(make_config: MakeConfig, tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("memory: 12gb\n", encoding="utf-8")
    made = blend(
        make_config(tmp_path / "out", content_config=more, max_train_steps=1, style_weights=(0.0, 1.0)), progress=False
    )
    resolved = TrainConfig.from_yaml(tmp_path / "out" / "train" / "style" / "config.yaml")
    assert (resolved.memory, resolved.encoder_offload, resolved.gradient_checkpointing) == ("12gb", "blocks", True)
    assert made.sheet.is_file()
