"""The cache of latents, loss weights and text embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.data import Example, encode_examples
from qrlora.data._encode import latent_weight
from qrlora.models import LoadedModel, load_pipeline


@pytest.fixture(scope="module")
def model(tiny_flux: Path) -> LoadedModel:
    return load_pipeline(tiny_flux)


def _examples(captions: Sequence[str], mask: torch.Tensor | None = None) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, 32, 32, generator=generator) * 2 - 1 for _ in captions]
    return [
        Example(Path(f"{row}.png"), pixels, mask if row == 0 else None, caption)
        for row, (pixels, caption) in enumerate(zip(pictures, captions, strict=True))
    ]


def test_equal_captions_are_encoded_once(model: LoadedModel) -> None:
    encoded = encode_examples(_examples(["cat", "dog", "cat"]), model.family, model.pipeline, max_sequence_length=16)
    assert encoded.caption_rows.tolist() == [0, 1, 0]
    assert encoded.conditioning["prompt_embeds"].shape == (2, 16, 32)
    assert encoded.conditioning["pooled_prompt_embeds"].shape == (2, 32)
    assert encoded.latents.shape == (3, 4, 4, 4)
    assert encoded.weights is None
    both = model.family.encode_prompts(model.pipeline, ["cat", "dog"], 16)
    for key, rows in both.items():
        torch.testing.assert_close(encoded.conditioning[key], rows)


def test_mirrored_pictures_follow_the_plain_ones(model: LoadedModel) -> None:
    mask = torch.zeros(1, 32, 32)
    mask[..., :8] = 1
    examples = _examples(["cat", "dog"], mask)
    encoded = encode_examples(examples, model.family, model.pipeline, max_sequence_length=16, random_flip=True)
    assert encoded.flips
    assert encoded.latents.shape[0] == 4
    expected = model.family.encode_pictures(model.pipeline, examples[1].pixels.flip(-1)[None])
    torch.testing.assert_close(encoded.latents[3:], expected)
    assert encoded.weights is not None
    torch.testing.assert_close(encoded.weights[0].flip(-1), encoded.weights[2])
    torch.testing.assert_close(encoded.weights[1], torch.ones(1, 4, 4))


def test_masks_can_be_ignored_and_count_in_the_fingerprint(model: LoadedModel) -> None:
    plain = _examples(["cat"])
    masked = _examples(["cat"], torch.eye(32)[None])
    arguments: dict[str, Any] = {"family": model.family, "pipeline": model.pipeline, "max_sequence_length": 16}
    with_mask = encode_examples(masked, **arguments)
    without = encode_examples(masked, **arguments, use_masks=False)
    assert without.weights is None
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


def test_moving_the_cache(model: LoadedModel) -> None:
    encoded = encode_examples(_examples(["cat"]), model.family, model.pipeline, max_sequence_length=16)
    moved = encoded.to(torch.device("cpu"), torch.bfloat16)
    assert moved.latents.dtype == torch.float32
    assert {rows.dtype for rows in cast(dict[str, torch.Tensor], moved.conditioning).values()} == {torch.bfloat16}
