"""Scores of pictures that need no network: which content and which style a picture is nearest to.

Content is nearest neighbour by cosine, after the style's mean is taken off, of the 1280 pooled activations of
EfficientNet-Lite0, whose ImageNet weights come inside a package. Style is a ridge classifier on `picture_statistics`,
whose own accuracy stands beside its scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qrlora.evaluation import EfficientNetFeatures as Features
from qrlora.evaluation import picture_statistics
from tools.emoji.dataset import Emoji

CENTRE = 60  # contents that a style's mean feature is taken over
SHOWN = 400  # contents whose pictures the classifier also sees as the model can show them

Through = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Judge:
    """Says which content and style pictures are nearest to.

    Attributes:
        styles: styles that the classifier knows.
        features: of pictures, for their content.
        rows: features [1280] of the judged pictures, by pair (content, style).
        means: mean features [1280] by style, over contents that are not judged.
        weights: of the style classifier [857, styles].
        accuracy: of the style classifier on the true pictures of the judged contents.
        accuracy_shown: the same on those pictures as the model can show them; None without `through`.
    """

    styles: Sequence[str]
    features: Features
    rows: Mapping[tuple[str, str], Tensor]
    means: Mapping[str, Tensor]
    weights: Tensor
    accuracy: float
    accuracy_shown: float | None

    @classmethod
    def make(
        cls,
        emoji: Emoji,
        features: Features,
        styles: Sequence[str],
        judged: Sequence[str],
        through: Through | None = None,
    ) -> "Judge":
        """Learn means and classifier from training contents, none of them `judged`.

        `through` takes pictures through the model's own autoencoder: what no denoiser can help is then in the gallery,
        and in a part of what the classifier learns from.
        """
        same = through if through is not None else lambda pictures: pictures
        others = [content for content in emoji.train_contents if content not in set(judged)]
        known, held = emoji.pairs(others, styles), emoji.pairs(judged, styles)
        truth = emoji.pictures(held)
        shown = same(truth)
        rows = dict(zip(held, features(shown), strict=True))
        means = {}
        for style in styles:
            centre = emoji.pairs(_spread(others, CENTRE), [style])
            means[style] = features(same(emoji.pictures(centre))).mean(dim=0)
        weights = _style_weights(emoji, styles, known, emoji.pairs(_spread(others, SHOWN), styles), through)
        judge = cls(styles, features, rows, means, weights, 0.0, None)
        wanted = [style for _, style in held]
        return replace(
            judge,
            accuracy=_share(judge.style(truth), wanted),
            accuracy_shown=None if through is None else _share(judge.style(shown), wanted),
        )

    def style(self, pictures: np.ndarray) -> list[str]:
        """The most likely style of each of `pictures`, uint8 [N, H, W, 3]."""
        made = F.pad(picture_statistics(torch.from_numpy(pictures)), (0, 1), value=1.0)
        return [self.styles[i] for i in (made @ self.weights).argmax(dim=1).tolist()]

    def content(self, pictures: np.ndarray, wanted: Sequence[str], candidates: Sequence[str]) -> list[str]:
        """For each of `pictures` the candidate whose picture in its `wanted` style is nearest, both centred."""
        return self.nearest(self.features(pictures), wanted, candidates)

    def nearest(self, rows: Tensor, wanted: Sequence[str], candidates: Sequence[str]) -> list[str]:
        """The same from features [N, 1280]."""
        return [self._nearest(row, style, candidates) for row, style in zip(rows, wanted, strict=True)]

    def distance(self, rows: Tensor, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """1 - cosine of features [N, 1280] and those of the true pictures of `pairs`, both centred by the style."""
        means = torch.stack([self.means[style] for _, style in pairs])
        truth = torch.stack([self.rows[pair] for pair in pairs])
        return (1 - F.cosine_similarity(rows - means, truth - means)).tolist()

    def _nearest(self, row: Tensor, style: str, candidates: Sequence[str]) -> str:
        drawn = [c for c in candidates if (c, style) in self.rows]
        gallery = F.normalize(torch.stack([self.rows[c, style] for c in drawn]) - self.means[style], dim=1)
        return drawn[int((gallery @ (row - self.means[style])).argmax())]


def _spread(items: Sequence[str], count: int) -> list[str]:
    """`count` of the items, evenly spaced, or all."""
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else list(items)


def _share(said: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)


def _style_weights(
    emoji: Emoji,
    styles: Sequence[str],
    known: Sequence[tuple[str, str]],
    again: Sequence[tuple[str, str]],
    through: Through | None,
) -> Tensor:
    """The classifier, from the pictures of `known` and, as the model shows them, of `again`."""
    pairs = [*known, *(again if through is not None else ())]
    rows = [picture_statistics(torch.from_numpy(emoji.pictures(known)))]
    if through is not None:
        rows.append(picture_statistics(torch.from_numpy(through(emoji.pictures(again)))))
    labels = torch.tensor([styles.index(style) for _, style in pairs])
    return ridge(torch.cat(rows), F.one_hot(labels, len(styles)))


def ridge(rows: Tensor, targets: Tensor, strength: float = 0.3) -> Tensor:
    """Weights [d + 1, k] of the regularised least squares of `targets` [n, k] on `rows` [n, d] and a one."""
    design = F.pad(rows, (0, 1), value=1.0).double()
    gram = design.T @ design + strength * torch.eye(design.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, design.T @ targets.double()).float()
