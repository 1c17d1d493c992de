"""The cache of latents, loss weights and text embeddings."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.data import Example, encode_examples, encode_texts
from qrlora.data._encode import latent_weight
from qrlora.models import LoadedModel, load_pipeline
from qrlora.models.flux import Flux


@pytest.fixture(scope="module")
def model(tiny_flux: Path) -> LoadedModel:
    return load_pipeline(tiny_flux)


def _examples(captions: Sequence[str], mask: torch.Tensor | None = None) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, 32, 32, generator=generator) * 2 - 1 for _ in captions]
    return [
        Example(f"{row}.png", pixels, mask if row == 0 else None, caption, (40, 40), (2, 5), 3)
        for row, (pixels, caption) in enumerate(zip(pictures, captions, strict=True))
    ]


def test_equal_captions_are_encoded_once(model: LoadedModel) -> None:
    encoded = encode_examples(_examples(["cat", "dog", "cat"]), model.family, model.pipeline, max_sequence_length=16)
    (group,) = encoded.groups
    assert group.caption_rows.tolist() == [0, 1, 0]
    assert encoded.conditioning["prompt_embeds"].shape == (2, 16, 32)
    assert encoded.conditioning["pooled_prompt_embeds"].shape == (2, 32)
    assert group.latents.shape == (3, 4, 4, 4)
    assert group.weights is None
    both = model.family.encode_prompts(model.pipeline, ["cat", "dog"], 16)
    for key, rows in both.items():
        torch.testing.assert_close(encoded.conditioning[key], rows)


def test_mirrored_pictures_follow_the_plain_ones(model: LoadedModel) -> None:
    mask = torch.zeros(1, 32, 32)
    mask[..., :8] = 1
    examples = _examples(["cat", "dog"], mask)
    encoded = encode_examples(examples, model.family, model.pipeline, max_sequence_length=16, random_flip=True)
    (group,) = encoded.groups
    assert (encoded.mirrored, encoded.counts) == (True, (2,))
    assert group.latents.shape[0] == 4
    expected = model.family.encode_pictures(model.pipeline, examples[1].pixels.flip(-1)[None])
    torch.testing.assert_close(group.latents[3:], expected)
    assert group.weights is not None
    torch.testing.assert_close(group.weights[0].flip(-1), group.weights[2])
    torch.testing.assert_close(group.weights[1], torch.ones(1, 4, 4))


def test_masks_can_be_ignored_and_count_in_the_fingerprint(model: LoadedModel) -> None:
    plain = _examples(["cat"])
    masked = _examples(["cat"], torch.eye(32)[None])
    arguments: dict[str, Any] = {"family": model.family, "pipeline": model.pipeline, "max_sequence_length": 16}
    with_mask = encode_examples(masked, **arguments)
    without = encode_examples(masked, **arguments, use_masks=False)
    assert without.groups[0].weights is None
    assert without.fingerprint == encode_examples(plain, **arguments).fingerprint
    assert with_mask.fingerprint != without.fingerprint
    assert encode_examples(_examples(["dog"]), **arguments).fingerprint != without.fingerprint


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([4, 8]), st.floats(0.01, 1.0))
def test_latent_weight_is_the_area_mean_over_its_mean(seed: int, grid: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(1, 32, 32, generator=generator) < share).float()
    mask[0, 0, 0] = 1
    size = 32 // grid
    area = mask.double().reshape(grid, size, grid, size).mean(dim=(1, 3))
    weight = latent_weight(mask, grid, grid)
    torch.testing.assert_close(weight[0].double(), area / area.mean(), rtol=1e-6, atol=1e-7)
    assert float(weight.mean()) == pytest.approx(1.0, abs=1e-5)


def test_the_conditioning_takes_the_denoisers_dtype(model: LoadedModel) -> None:
    encoded = encode_examples(_examples(["cat"]), model.family, model.pipeline, max_sequence_length=16)
    moved = encoded.to(torch.bfloat16)
    assert moved.groups[0].latents.dtype == torch.float32
    assert {rows.dtype for rows in cast(dict[str, torch.Tensor], moved.conditioning).values()} == {torch.bfloat16}


def test_texts_that_were_encoded_before_replace_the_text_encoders(model: LoadedModel) -> None:
    texts = encode_texts(["dog", "cat", "dog"], model.family, model.pipeline, 16)
    assert list(texts) == ["dog", "cat"]
    length = {"max_sequence_length": 16}
    expected = encode_examples(_examples(["cat", "dog"]), model.family, model.pipeline, **length)
    bare = SimpleNamespace(vae=model.pipeline.vae)
    got = encode_examples(_examples(["cat", "dog"]), model.family, bare, **length, texts=texts)
    for key, rows in expected.conditioning.items():
        assert torch.equal(got.conditioning[key], rows)


class _Told(Flux):
    """A family that tells its denoiser where pictures were cut, as SDXL does."""

    def picture_conditioning(
        self, original_sizes: torch.Tensor, crops_top_left: torch.Tensor, target_sizes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {"places": torch.cat([original_sizes, crops_top_left, target_sizes], dim=1).float()}


def test_pictures_of_two_sizes_with_crops_and_mirrors(model: LoadedModel) -> None:
    """Row `picture + count * variant`, plain crops before mirrored ones, each size by itself."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (32, 32), "b": (16, 48), "c": (32, 32)}
    examples = [
        Example(name, torch.rand(3, *shape, generator=generator) * 2 - 1, None, name, (64, 70), (crop, 4), 6)
        for name, shape in shapes.items()
        for crop in (0, 1)
    ]
    # the second crop of c is the first one again
    examples[5] = replace(examples[4], crop_top_left=(1, 4))
    calls: list[int] = []
    family = _Told()
    encoded = encode_examples(
        iter(examples),
        family,
        model.pipeline,
        max_sequence_length=16,
        crops=2,
        random_flip=True,
        on_picture=calls.append,
    )
    assert calls == [1, 2, 3]
    assert (encoded.counts, encoded.crops, encoded.mirrored) == ((1, 2), 2, True)
    assert [group.caption_rows.tolist() for group in encoded.groups] == [[1], [0, 2]]
    assert [tuple(group.latents.shape) for group in encoded.groups] == [(4, 4, 2, 6), (8, 4, 4, 4)]
    order = [["b"], ["a", "c"]]
    for group, names in zip(encoded.groups, order, strict=True):
        for place, name in enumerate(names):
            for crop in (0, 1):
                example = examples[2 * list(shapes).index(name) + crop]
                for mirrored in (0, 1):
                    row = place + len(names) * (crop + 2 * mirrored)
                    pixels = example.pixels.flip(-1) if mirrored else example.pixels
                    expected = family.encode_pictures(model.pipeline, pixels[None])[0]
                    assert torch.equal(group.latents[row], expected)
                    told = [64, 70, crop, 6 if mirrored else 4, *pixels.shape[-2:]]
                    assert group.picture_conditioning["places"][row].tolist() == told
    assert encoded.conditioning["prompt_embeds"].shape[0] == 3


def test_what_the_denoiser_is_told_of_pictures_counts_in_the_fingerprint(model: LoadedModel) -> None:
    one, other = _examples(["cat"]), [replace(_examples(["cat"])[0], original_size=(80, 80))]
    for family, equal in ((_Told(), False), (model.family, True)):
        prints = {
            encode_examples(given, family, model.pipeline, max_sequence_length=16).fingerprint for given in (one, other)
        }
        assert (len(prints) == 1) == equal
