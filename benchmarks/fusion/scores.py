"""Scores of pictures whose right answer exists."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.fusion.store import digest, key_of
from qrlora.evaluation import hellinger, multiscale
from qrlora.formats import read_safetensors, write_safetensors
from tools.emoji.dataset import Emoji
from tools.emoji.scores import Features, Judge, Through

Pair = tuple[str, str]
HITS = ("content", "style", "both")
DISTANCES = ("feature", "pixels", "look")


@dataclass(frozen=True)
class Scorer:
    """A judge and the true pictures, as the base's autoencoder shows them.

    Attributes:
        judge: of content and style.
        candidates: contents to be taken for.
        truth: uint8 `[H, W, 3]` by pair.
    """

    judge: Judge
    candidates: Sequence[str]
    truth: dict[Pair, np.ndarray]

    def __call__(
        self, pictures: np.ndarray, pairs: Sequence[Pair], candidates: Sequence[str] | None = None
    ) -> dict[str, list[float]]:
        """One number a picture and score, against the true picture of its pair; other `candidates` where given.

        `content`, `style`, `both`: 1 where right. `feature`: 1 - cosine of centred EfficientNet features, 0 to 2.
        `pixels`: mean over four scales of the mean absolute difference of colours and of their gradients, 0 to 1.
        `look`: Hellinger distance of colour and gradient histograms, 0 to 1.
        """
        rows = self.judge.features(pictures)
        said = self.judge.nearest(rows, [style for _, style in pairs], candidates or self.candidates)
        content = [float(one == c) for one, (c, _) in zip(said, pairs, strict=True)]
        style = [float(one == s) for one, (_, s) in zip(self.judge.style(pictures), pairs, strict=True)]
        truth = np.stack([self.truth[pair] for pair in pairs])
        return {
            "content": content,
            "style": style,
            "both": [a * b for a, b in zip(content, style, strict=True)],
            "feature": self.judge.distance(rows, pairs),
            "pixels": multiscale(_unit(pictures), _unit(truth)).tolist(),
            "look": hellinger(pictures, truth).tolist(),
        }

    def moved(self, pictures: np.ndarray, before: np.ndarray, styles: Sequence[str]) -> list[float]:
        """How far pictures are from those before: 1 - cosine of features centred by the mean of each one's style."""
        means = torch.stack([self.judge.means[style] for style in styles])
        one, other = (self.judge.features(each) - means for each in (pictures, before))
        return (1 - F.cosine_similarity(one, other)).tolist()


def _unit(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def make_scorer(
    emoji: Emoji, features: Features, judged: Sequence[str], candidates: Sequence[str], through: Through, folder: Path
) -> Scorer:
    """The scorer of some contents; what takes a minute to learn is kept in `folder`.

    Args:
        emoji: the data set.
        features: of pictures.
        judged: contents whose pictures are scored and that nothing is learned from.
        candidates: contents to be taken for, among the judged.
        through: pictures through the base's autoencoder.
        folder: of the store.
    """
    key = key_of({"judge": list(judged), "styles": list(emoji.styles), "pictures": digest(emoji.arrays)})
    path = folder / "judges" / f"{key}.safetensors"
    if not path.exists():
        made = Judge.make(emoji, features, emoji.styles, judged, through=through)
        tensors = {f"row/{c}/{s}": row.contiguous() for (c, s), row in made.rows.items()}
        tensors |= {f"mean/{style}": row.contiguous() for style, row in made.means.items()}
        tensors |= {"weights": made.weights, "accuracy": torch.tensor([made.accuracy, made.accuracy_shown or 0.0])}
        write_safetensors(path, tensors)
    tensors, _ = read_safetensors(path)
    rows = {(k.split("/")[1], k.split("/")[2]): t for k, t in tensors.items() if k.startswith("row/")}
    means = {k.removeprefix("mean/"): t for k, t in tensors.items() if k.startswith("mean/")}
    accuracy, shown = tensors["accuracy"].tolist()
    judge = Judge(emoji.styles, features, rows, means, tensors["weights"], accuracy, shown)
    truth = dict(zip(rows, through(emoji.pictures(list(rows))), strict=True))
    return Scorer(judge, candidates, truth)
