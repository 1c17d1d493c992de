"""The judge, on features that are known: content and style in coordinates of their own."""

import numpy as np
import pytest
import torch

from tools.emoji.dataset import Emoji
from tools.emoji.scores import Judge, ridge

STYLES = ("flat", "ink", "round")
CONTENTS = [f"{i:x}" for i in range(12)]


@pytest.fixture
def emoji() -> Emoji:
    """Pictures of one pixel: red is the content, green the style."""
    pairs = [(c, s) for c in range(len(CONTENTS)) for s in range(len(STYLES))]
    meta = {
        "size": 1,
        "styles": [{"name": name, "role": "train"} for name in STYLES],
        "contents": [
            {"key": key, "name": key, "category": "objects", "split": "train" if i < 8 else "dev"}
            for i, key in enumerate(CONTENTS)
        ],
    }
    arrays = np.array([[[[c, s, 0]]] for c, s in pairs], dtype=np.uint8)
    return Emoji.of(arrays, np.array([s for _, s in pairs]), np.array([c for c, _ in pairs]), meta)


def features(pictures: np.ndarray) -> torch.Tensor:
    content, style = (
        torch.from_numpy(pictures[:, 0, 0, 0].astype(int)),
        torch.from_numpy(pictures[:, 0, 0, 1].astype(int)),
    )
    rows = torch.cat([torch.eye(len(CONTENTS))[content], 3 * torch.eye(len(STYLES))[style]], dim=1)
    return rows


def test_it_finds_content_and_style_of_true_pictures(emoji: Emoji) -> None:
    judge = Judge.make(emoji, features, STYLES, emoji.dev_contents)  # pyright: ignore[reportArgumentType]
    assert judge.own_accuracy == 1
    for content, style in emoji.pairs(emoji.dev_contents):
        row = features(emoji[content, style][None])
        assert judge.content(row, style, emoji.dev_contents) == [content]
        assert judge.style(row) == [style]


def test_a_picture_of_another_content_is_not_taken_for_it(emoji: Emoji) -> None:
    judge = Judge.make(emoji, features, STYLES, emoji.dev_contents)  # pyright: ignore[reportArgumentType]
    wanted, shown = emoji.dev_contents[:2]
    assert judge.content(features(emoji[shown, "ink"][None]), "ink", emoji.dev_contents) != [wanted]


def test_ridge_is_the_regularised_least_squares_solution() -> None:
    rows, targets = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    unit = np.concatenate([(rows / rows.norm(dim=1, keepdim=True)).numpy(), np.ones((20, 1))], axis=1)
    stacked = np.concatenate([unit, np.sqrt(0.3) * np.eye(5)])
    expected = np.linalg.lstsq(stacked, np.concatenate([targets.numpy(), np.zeros((5, 2))]), rcond=None)[0]
    assert np.allclose(ridge(rows, targets, 0.3), expected, atol=1e-6)
