"""Everything the denoiser sees that does not change from step to step, computed once and kept in memory."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qrlora.data._examples import Example
from qrlora.models import Family


@dataclass(frozen=True)
class Group:
    """Cached pictures of one size: `n` pictures, each in `v` variants (crops, plain and mirrored).

    Variant `v` of picture `i` is row `i + n * v`; plain variants come before mirrored ones.

    Attributes:
        latents: `[n * v, C, h, w]`, fp32.
        weights: `[n * v, 1, h, w]` with mean 1 over each picture, the loss mask on the latent grid; None without masks.
        caption_rows: `[n]`, the row of the conditioning of each picture.
        picture_conditioning: what the family tells the denoiser of a picture, one row a variant; often nothing.
    """

    latents: Tensor
    weights: Tensor | None
    caption_rows: Tensor
    picture_conditioning: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def count(self) -> int:
        """Pictures."""
        return len(self.caption_rows)


@dataclass(frozen=True)
class Encoded:
    """Cached inputs of the denoiser, on the CPU.

    Attributes:
        groups: the pictures by size.
        conditioning: one row a distinct caption.
        fingerprint: sha256 over pixels, masks, captions, and what the family tells the denoiser of pictures.
        crops: of each picture.
        mirrored: whether each crop is there mirrored as well.
        captions: the text of each row of `conditioning`, for text encoders that read it again.
    """

    groups: tuple[Group, ...]
    conditioning: dict[str, Tensor]
    fingerprint: str
    crops: int = 1
    mirrored: bool = False
    captions: tuple[str, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """Pictures by group."""
        return tuple(group.count for group in self.groups)

    def to(self, dtype: torch.dtype) -> "Encoded":
        """The conditioning in the denoiser's `dtype`; latents, weights and what is told of pictures stay in fp32."""
        return replace(self, conditioning={key: rows.to(dtype) for key, rows in self.conditioning.items()})


def encode_examples(
    examples: Iterable[Example],
    family: Family,
    pipeline: Any,
    *,
    max_sequence_length: int,
    crops: int = 1,
    random_flip: bool = False,
    use_masks: bool = True,
    texts: Mapping[str, Mapping[str, Tensor]] | None = None,
    on_picture: Callable[[int], object] = lambda done: None,
) -> Encoded:
    """Run the encoders once, one picture at a time, wherever the pipeline's encoders are.

    Args:
        examples: from `frame`; held one picture at a time where they are made one at a time.
        family: the pipeline's.
        pipeline: with its text encoders and autoencoder.
        max_sequence_length: tokens of the long text encoder.
        crops: how many examples in a row are one picture.
        random_flip: encode every picture mirrored as well.
        use_masks: False drops the examples' masks.
        texts: from `encode_texts`; where given, the text encoders may be absent.
        on_picture: called with the number of pictures done.

    Returns:
        Latents and weights in fp32; conditioning in the text encoders' dtype.
    """
    shelves: dict[tuple[int, ...], _Shelf] = {}
    captions: dict[str, int] = {}
    digest = hashlib.sha256()
    for number, variants in enumerate(_by_picture(examples, crops), start=1):
        if not use_masks:
            variants = [replace(example, mask=None) for example in variants]
        for example in variants:
            _hash(digest, example)
        if random_flip:
            variants += [example.mirrored() for example in variants]
        shelf = shelves.setdefault(tuple(variants[0].pixels.shape), _Shelf(len(variants)))
        shelf.add(variants, captions.setdefault(variants[0].caption, len(captions)), family, pipeline)
        on_picture(number)
    groups = tuple(shelf.group(family) for _, shelf in sorted(shelves.items()))
    for group in groups:
        for key, rows in group.picture_conditioning.items():
            digest.update(key.encode() + rows.numpy().tobytes())
    rows = encode_texts(captions, family, pipeline, max_sequence_length) if texts is None else texts
    keys = rows[next(iter(captions))]
    return Encoded(
        groups=groups,
        conditioning={key: torch.cat([rows[caption][key] for caption in captions]) for key in keys},
        fingerprint=digest.hexdigest(),
        crops=crops,
        mirrored=random_flip,
        captions=tuple(captions),
    )


def encode_texts(
    captions: Iterable[str], family: Family, pipeline: Any, max_sequence_length: int
) -> dict[str, dict[str, Tensor]]:
    """The conditioning of each distinct caption, one row each, kept on the CPU."""
    return {
        caption: {
            key: row.cpu() for key, row in family.encode_prompts(pipeline, [caption], max_sequence_length).items()
        }
        for caption in dict.fromkeys(captions)
    }


def latent_weight(mask: Tensor | None, height: int, width: int) -> Tensor:
    """`[1, H, W]` mask in [0, 1] to `[1, h, w]` loss weights: area means on the latent grid, divided by their mean.

    The mean of `weight * error` is then the mean error over the masked area, whatever that area's size.
    """
    if mask is None:
        return torch.ones(1, height, width)
    area = F.adaptive_avg_pool2d(mask.double(), (height, width))
    return (area / area.mean()).float()


class _Shelf:
    """Pictures of one size as they come, by variant."""

    def __init__(self, variants: int) -> None:
        self._latents: list[list[Tensor]] = [[] for _ in range(variants)]
        self._weights: list[list[Tensor | None]] = [[] for _ in range(variants)]
        self._places: list[list[tuple[int, ...]]] = [[] for _ in range(variants)]
        self._captions: list[int] = []

    def add(self, variants: Sequence[Example], caption: int, family: Family, pipeline: Any) -> None:
        known: list[tuple[Tensor, Tensor]] = []
        for place, example in enumerate(variants):
            latents = next((latents for pixels, latents in known if torch.equal(pixels, example.pixels)), None)
            if latents is None:  # crops of a picture without room to move are all one
                latents = family.encode_pictures(pipeline, example.pixels[None]).float().cpu()
                known.append((example.pixels, latents))
            weight = None if example.mask is None else latent_weight(example.mask, *latents.shape[-2:])
            self._latents[place].append(latents)
            self._weights[place].append(weight)
            self._places[place].append((*example.original_size, *example.crop_top_left, *example.pixels.shape[-2:]))
        self._captions.append(caption)

    def group(self, family: Family) -> Group:
        latents = torch.cat([one for variant in self._latents for one in variant])
        masks = [one for variant in self._weights for one in variant]
        full = torch.ones(1, *latents.shape[-2:])
        original, corner, target = torch.tensor([one for variant in self._places for one in variant]).split(2, dim=1)
        return Group(
            latents=latents,
            weights=torch.stack([full if mask is None else mask for mask in masks])
            if any(mask is not None for mask in masks)
            else None,
            caption_rows=torch.tensor(self._captions),
            picture_conditioning=family.picture_conditioning(original, corner, target),
        )


def _by_picture(examples: Iterable[Example], crops: int) -> Iterator[list[Example]]:
    picture: list[Example] = []
    for example in examples:
        picture.append(example)
        if len(picture) == crops:
            yield picture
            picture = []
    if picture:
        raise ValueError(f"{len(picture)} examples are left over of {crops} crops a picture")


def _hash(digest: "hashlib._Hash", example: Example) -> None:
    digest.update(repr((example.caption, tuple(example.pixels.shape))).encode())
    digest.update(example.pixels.numpy().tobytes())
    if example.mask is not None:
        digest.update(b"mask" + example.mask.numpy().tobytes())
