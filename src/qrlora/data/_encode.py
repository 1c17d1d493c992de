"""Everything the denoiser sees that does not change from step to step, computed once and kept in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qrlora.data._examples import Example
from qrlora.models import Family


@dataclass(frozen=True)
class Encoded:
    """Cached inputs of the denoiser; row `i + n * flipped` of `latents` and `weights` is example `i`.

    Attributes:
        latents: `[n, C, h, w]`, or `[2 n, C, h, w]` with the mirrored pictures after the plain ones.
        weights: `[n or 2 n, 1, h, w]` with mean 1 over each picture, the loss mask on the latent grid; None without
        masks. conditioning: one row a distinct caption.
        caption_rows: `[n]`, the row of `conditioning` of each example.
        count: n.
        fingerprint: sha256 over pixels, masks and captions.
    """

    latents: Tensor
    weights: Tensor | None
    conditioning: dict[str, Tensor]
    caption_rows: Tensor
    count: int
    fingerprint: str

    @property
    def flips(self) -> bool:
        """Whether mirrored rows are there."""
        return len(self.latents) == 2 * self.count

    def to(self, device: torch.device, dtype: torch.dtype) -> "Encoded":
        """Tensors on `device`; the conditioning in the denoiser's `dtype`, latents and weights in fp32."""
        return Encoded(
            latents=self.latents.to(device),
            weights=None if self.weights is None else self.weights.to(device),
            conditioning={key: rows.to(device, dtype) for key, rows in self.conditioning.items()},
            caption_rows=self.caption_rows.to(device),
            count=self.count,
            fingerprint=self.fingerprint,
        )


def encode_examples(
    examples: Sequence[Example],
    family: Family,
    pipeline: Any,
    *,
    max_sequence_length: int,
    random_flip: bool = False,
    use_masks: bool = True,
) -> Encoded:
    """Run the encoders once, one picture at a time, wherever the pipeline's encoders are.

    Args:
        examples: of one resolution.
        family: the pipeline's.
        pipeline: with its text encoders and autoencoder.
        max_sequence_length: tokens of the long text encoder.
        random_flip: encode every picture mirrored as well.
        use_masks: False drops the examples' masks.

    Returns:
        Latents and weights in fp32; conditioning in the text encoders' dtype.
    """
    captions = list(dict.fromkeys(example.caption for example in examples))
    rows = [family.encode_prompts(pipeline, [caption], max_sequence_length) for caption in captions]
    pictures = [example.pixels for example in examples]
    masks = [example.mask if use_masks else None for example in examples]
    if random_flip:
        pictures += [pixels.flip(-1) for pixels in pictures]
        masks += [None if mask is None else mask.flip(-1) for mask in masks]
    latents = torch.cat([family.encode_pictures(pipeline, pixels[None]) for pixels in pictures]).float()
    weights = None
    if any(mask is not None for mask in masks):
        weights = torch.stack([latent_weight(mask, latents.shape[-2], latents.shape[-1]) for mask in masks]).to(
            latents.device
        )
    return Encoded(
        latents=latents,
        weights=weights,
        conditioning={key: torch.cat([row[key] for row in rows]) for key in rows[0]},
        caption_rows=torch.tensor([captions.index(example.caption) for example in examples]),
        count=len(examples),
        fingerprint=_fingerprint(examples, use_masks),
    )


def latent_weight(mask: Tensor | None, height: int, width: int) -> Tensor:
    """`[1, H, W]` mask in [0, 1] to `[1, h, w]` loss weights: area means on the latent grid, divided by their mean.

    The mean of `weight * error` is then the mean error over the masked area, whatever that area's size.
    """
    if mask is None:
        return torch.ones(1, height, width)
    area = F.adaptive_avg_pool2d(mask.double(), (height, width))
    return (area / area.mean()).float()


def _fingerprint(examples: Sequence[Example], use_masks: bool) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.caption, tuple(example.pixels.shape))).encode())
        digest.update(example.pixels.numpy().tobytes())
        if use_masks and example.mask is not None:
            digest.update(b"mask" + example.mask.numpy().tobytes())
    return digest.hexdigest()
