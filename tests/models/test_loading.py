"""Loading pipelines, their settings file, and giving encoders back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qrlora.errors import QrloraError
from qrlora.models import GenerationDefaults, LoadedModel, family_of, load_pipeline
from tests.tiny_pipelines import GENERATION, flux_pipeline


def test_settings_come_from_the_folder(tiny_flux: Path) -> None:
    model = load_pipeline(tiny_flux, dtype=torch.bfloat16)
    assert model.model_id == "tiny-flux"
    assert model.defaults.model_dump() == GENERATION
    assert model.training == {"resolution": 32, "rank": 4}
    assert model.denoiser.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.denoiser.parameters())


def test_without_settings_the_familys_defaults_hold(tmp_path: Path) -> None:
    flux_pipeline(guidance_embeds=True).save_pretrained(tmp_path / "plain")
    model = load_pipeline(tmp_path / "plain")
    assert model.defaults == GenerationDefaults()
    assert model.training == {"resolution": 512}
    assert model.model_id == str(tmp_path / "plain")


def test_without_a_guidance_embedding_a_flux_is_schnell_like(tmp_path: Path) -> None:
    flux_pipeline().save_pretrained(tmp_path / "plain")
    defaults = load_pipeline(tmp_path / "plain").defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.max_sequence_length) == (4, 0.0, 256)


def test_settings_that_mean_nothing_for_the_family_are_named(tiny_sdxl: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sdxl, tmp_path / "m")
    for generation, words in (
        ({"true_cfg_scale": 2.0}, r"qrlora\.json of .*: generation\.true_cfg_scale=2\.0 has no meaning for sdxl"),
        ({"max_sequence_length": 128}, r"generation\.max_sequence_length=128 is not possible for sdxl"),
    ):
        (tmp_path / "m" / "qrlora.json").write_text(json.dumps({"generation": generation}))
        with pytest.raises(QrloraError, match=words):
            load_pipeline(tmp_path / "m")


def test_a_typo_in_the_settings_is_named(tmp_path: Path) -> None:
    flux_pipeline().save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "qrlora.json").write_text(json.dumps({"generation": {"hight": 64}}))
    with pytest.raises(QrloraError, match=r"generation\.hight"):
        load_pipeline(tmp_path / "plain")
    (tmp_path / "plain" / "qrlora.json").write_text("{")
    with pytest.raises(QrloraError, match=r"qrlora\.json cannot be read"):
        load_pipeline(tmp_path / "plain")


def test_missing_models_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match="there is no model folder"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(QrloraError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
    with pytest.raises(QrloraError, match="neither a local folder nor to be had from the hub"):
        load_pipeline("nobody/nothing-here")
    (tmp_path / "file").write_text("")
    with pytest.raises(QrloraError, match="is a file"):
        load_pipeline(tmp_path / "file")


def test_a_broken_folder_is_named(tiny_flux: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text((tiny_flux / "model_index.json").read_text())
    with pytest.raises(QrloraError, match="cannot be loaded"):
        load_pipeline(tmp_path)


def test_a_misspelt_role_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "qrlora.json").write_text('{"roles": {"styles": {"max_train_steps": 60}}}')
    with pytest.raises(QrloraError, match=r"qrlora.json: roles\.styles.*'content' or 'style'"):
        load_pipeline(tmp_path)


def _picture(model: LoadedModel) -> np.ndarray:
    return np.asarray(model.family.generate(model.pipeline, ["a cat"], seeds=[1], **model.defaults.model_dump())[0])


@pytest.mark.parametrize("in_memory", [False, True])
def test_encoders_are_freed_and_come_back(tiny_flux: Path, in_memory: bool) -> None:
    model = load_pipeline(tiny_flux)
    if in_memory:
        model = LoadedModel(model.pipeline, family_of(model.pipeline), "tiny", model.defaults)
    before = _picture(model)
    model.release_encoders(keep_pictures=True)
    assert model.pipeline.text_encoder is model.pipeline.text_encoder_2 is None
    assert model.pipeline.vae is not None
    model.release_encoders()
    assert model.pipeline.vae is None
    with pytest.raises(QrloraError, match="restore_encoders"):
        model.family.encode_prompts(model.pipeline, ["a cat"], 16)
    model.restore_encoders()
    np.testing.assert_array_equal(_picture(model), before)
    for name in ("text_encoder", "text_encoder_2", "vae"):
        part = getattr(model.pipeline, name)
        assert not part.training
        assert in_memory or not any(parameter.requires_grad for parameter in part.parameters())


def test_nothing_is_unpickled(tiny_flux: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_flux, tmp_path / "m")
    (weights,) = (tmp_path / "m" / "vae").glob("*.safetensors")
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(QrloraError, match="cannot be loaded"):
        load_pipeline(tmp_path / "m")
