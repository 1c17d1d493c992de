"""Qwen-Image: what we hand to the denoiser and get from it is what the stock pipeline does."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qrlora.adapter import AdapterSpec, add_adapter, target_layers, trainable_parameters
from qrlora.errors import QrloraError
from qrlora.models import family_of
from qrlora.models._common import pack, unpack
from tests.tiny_newer import LENGTH, QWEN_GENERATION, qwen_image_pipeline, qwen_image_transformer

SETTINGS: dict[str, Any] = {**QWEN_GENERATION, "num_inference_steps": 3, "true_cfg_scale": 3.0}
PROMPTS = ["a cat", "a dog, told at some length"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = qwen_image_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def noise(count: int = 1) -> Tensor:
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def test_the_templates_beginning_is_dropped(pipeline: Any) -> None:
    """34 tokens in the model's own vocabulary, and so in the small one."""
    before, _ = pipeline.prompt_template_encode.split("{}")
    assert len(pipeline.tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx == 34
    rows = family_of(pipeline).encode_prompts(pipeline, ["a cat"], LENGTH)
    # five letters and the template's end: a mark, a line's end, a mark, one word, a line's end
    assert rows["prompt_embeds_mask"].sum() == 5 + 5


def test_prompts_are_padded_to_one_length_and_masked(pipeline: Any) -> None:
    family = family_of(pipeline)
    rows = family.encode_prompts(pipeline, PROMPTS, LENGTH)
    expected, mask = pipeline.encode_prompt(PROMPTS)
    longest = expected.shape[1]
    assert rows["prompt_embeds"].shape == (2, LENGTH, 16)
    torch.testing.assert_close(rows["prompt_embeds"][:, :longest], expected)
    assert rows["prompt_embeds_mask"][:, :longest].tolist() == mask.tolist()
    assert not rows["prompt_embeds"][:, longest:].any()
    assert not rows["prompt_embeds_mask"][:, longest:].any()
    # cut as the pipeline cuts
    short, _ = pipeline.encode_prompt(PROMPTS[1], max_sequence_length=8)
    torch.testing.assert_close(family.encode_prompts(pipeline, PROMPTS[1:], 8)["prompt_embeds"], short)


def test_prompts_of_two_lengths_in_one_batch_are_those_alone(pipeline: Any) -> None:
    family, levels = family_of(pipeline), torch.tensor([0.8, 0.3])
    rows = family.encode_prompts(pipeline, PROMPTS, LENGTH)
    seen: list[tuple[int, bool]] = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, given: seen.append(
            (given["encoder_hidden_states"].shape[1], given["encoder_hidden_states_mask"] is None)
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        both = family.predict(pipeline.transformer, noise(2), levels, rows, 1.0)
        for index in range(2):
            row = {key: value[index : index + 1] for key, value in rows.items()}
            alone = family.predict(
                pipeline.transformer, noise(2)[index : index + 1], levels[index : index + 1], row, 1.0
            )
            torch.testing.assert_close(both[index : index + 1], alone, rtol=1e-5, atol=1e-5)
    handle.remove()
    lengths = [int(each) for each in rows["prompt_embeds_mask"].sum(dim=1)]
    assert seen == [(max(lengths), False), (lengths[0], True), (lengths[1], True)]


def test_latents_decode_as_the_stock_pipeline_decodes(pipeline: Any) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    vae = pipeline.vae
    latents = family_of(pipeline).encode_pictures(pipeline, pixels)
    assert latents.shape == (2, 4, 4, 4)
    tokens = pack(latents)
    frames = pipeline._unpack_latents(tokens, 32, 32, 8)
    mean, deviation = (
        torch.tensor(each)[None, :, None, None, None] for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    torch.testing.assert_close(frames * deviation + mean, vae.encode(pixels.unsqueeze(2)).latent_dist.mode())


@pytest.mark.parametrize("sigma", [1.0, 0.4])
def test_one_guided_euler_step_of_predict_is_the_stock_pipelines(pipeline: Any, sigma: float) -> None:
    """Without the last level's own place, which a table of one step has no room for."""
    pipeline = copy.copy(pipeline)
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, shift_terminal=None)
    family, latents = family_of(pipeline), noise()
    stock = pipeline(
        "a cat",
        negative_prompt="a dog, told",
        true_cfg_scale=3.0,
        height=32,
        width=32,
        num_inference_steps=1,
        sigmas=[sigma],
        latents=pack(latents),
        output_type="latent",
    ).images
    level = pipeline.scheduler.sigmas[:1]
    with torch.no_grad():
        towards, away = (
            pack(family.predict(pipeline.transformer, latents, level, rows, 1.0))
            for rows in (
                family.encode_prompts(pipeline, ["a cat"], LENGTH),
                family.encode_negative(pipeline, "a dog, told", LENGTH),
            )
        )
    guided = away + 3.0 * (towards - away)
    guided = guided * (towards.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(unpack(stock, 4, 4), latents - level * unpack(guided, 4, 4), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(towards, away)


def test_generate_is_the_stock_pipeline(pipeline: Any) -> None:
    expected = pipeline(
        "a cat",
        negative_prompt="",
        true_cfg_scale=3.0,
        height=32,
        width=32,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    (ours,) = family_of(pipeline).generate(pipeline, ["a cat"], seeds=[5], **SETTINGS)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_a_picture_does_not_depend_on_its_batch(pipeline: Any) -> None:
    family, prompts = family_of(pipeline), [*PROMPTS, "a cat"]
    many = family.generate(pipeline, prompts, seeds=[5, 6, 7], **SETTINGS)
    (alone,) = family.generate(pipeline, prompts[1:2], seeds=[6], **SETTINGS)
    np.testing.assert_array_equal(np.asarray(many[1]), np.asarray(alone))
    together = family.generate(pipeline, prompts, seeds=[5, 6, 7], **SETTINGS, batch_size=3)
    for one, other in zip(many, together, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_levels_are_not_shifted_for_training(pipeline: Any) -> None:
    process = family_of(pipeline).noise_process(pipeline)
    torch.testing.assert_close(process.levels, torch.arange(1000, 0, -1) / 1000)


def test_every_adapted_layer_is_of_use() -> None:
    """The last block's text comes to nothing, so what asks for it and projects it is left out."""
    transformer = qwen_image_transformer()
    family = family_of(transformer)
    add_adapter(transformer, AdapterSpec(rank=2, basis="lora"), "content")
    rows = {"prompt_embeds": torch.randn(1, 5, 16)}
    family.predict(transformer, noise(), torch.tensor([0.5]), rows, 1.0).sum().backward()
    trained = trainable_parameters(transformer, "content")
    assert all(parameter.grad is not None for parameter in trained.values())
    assert len(target_layers(qwen_image_transformer())) == 8 + 6
    # asked for by name, they are adapted all the same
    assert len(target_layers(qwen_image_transformer(), ["attn.to_add_out"])) == 2


def test_refusals(pipeline: Any) -> None:
    family = family_of(pipeline)

    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(QrloraError, match=words):
            family.generate(pipeline, ["a"], seeds=[1], **{**SETTINGS, **changes})

    refused("height=40 must be a multiple of 16", height=40)
    refused(r"guidance_scale=3\.0 has no meaning for qwen-image, whose .* is true_cfg_scale", guidance_scale=3.0)
    refused("max_sequence_length=1025 is not possible for qwen-image: it is 1 to 1024", max_sequence_length=1025)
    assert family_of(pipeline.transformer) is family
    sibling = qwen_image_transformer()
    sibling.register_to_config(zero_cond_t=True)
    with pytest.raises(QrloraError, match="belongs to no model family"):
        family_of(sibling)
