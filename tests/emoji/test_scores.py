"""The judge, on pictures that are known: content in the red, style in the green and in where it lies."""

import numpy as np
import pytest
import torch

from tools.emoji.dataset import Emoji
from tools.emoji.scores import Judge, ridge

STYLES = ("flat", "ink", "round")
CONTENTS = [f"{i:x}" for i in range(12)]


@pytest.fixture
def emoji() -> Emoji:
    """Pictures of 8 x 8: red is the content, green the style."""
    pairs = [(c, s) for c in range(len(CONTENTS)) for s in range(len(STYLES))]
    meta = {
        "size": 8,
        "styles": [{"name": name, "role": "train"} for name in STYLES],
        "contents": [
            {"key": key, "name": key, "category": "objects", "split": "train" if i < 8 else "dev"}
            for i, key in enumerate(CONTENTS)
        ],
    }
    arrays = np.stack([picture(c, s) for c, s in pairs])
    return Emoji.of(arrays, np.array([s for _, s in pairs]), np.array([c for c, _ in pairs]), meta)


def picture(content: int, style: int) -> np.ndarray:
    made = np.zeros((8, 8, 3), np.uint8)
    made[..., 0], made[..., 1] = content, 100 * style
    return made


def features(pictures: np.ndarray) -> torch.Tensor:
    """One-hot content, and three times one-hot style, which centring is to take off."""
    content = torch.from_numpy(pictures[:, 0, 0, 0].astype(int))
    style = torch.from_numpy(pictures[:, 0, 0, 1].astype(int) // 100)
    return torch.cat([torch.eye(len(CONTENTS))[content], 3 * torch.eye(len(STYLES))[style]], dim=1)


def made(emoji: Emoji, **given: object) -> Judge:
    return Judge.make(emoji, features, STYLES, emoji.dev_contents, **given)  # pyright: ignore[reportArgumentType]


def test_it_finds_content_and_style_of_true_pictures(emoji: Emoji) -> None:
    judge = made(emoji)
    assert judge.accuracy == 1
    assert judge.accuracy_shown is None
    pairs = emoji.pairs(emoji.dev_contents)
    pictures = emoji.pictures(pairs)
    assert judge.content(pictures, [s for _, s in pairs], emoji.dev_contents) == [c for c, _ in pairs]
    assert judge.style(pictures) == [s for _, s in pairs]


def test_a_picture_of_another_content_is_not_taken_for_it(emoji: Emoji) -> None:
    wanted, shown = emoji.dev_contents[:2]
    assert made(emoji).content(emoji[shown, "ink"][None], ["ink"], emoji.dev_contents) != [wanted]


def test_what_the_model_cannot_show_counts_in_the_second_accuracy_alone(emoji: Emoji) -> None:
    def grey(pictures: np.ndarray) -> np.ndarray:
        return np.zeros_like(pictures)

    judge = made(emoji, through=grey)
    assert judge.accuracy == 1
    assert judge.accuracy_shown == pytest.approx(1 / len(STYLES))


def test_ridge_is_the_regularised_least_squares_solution() -> None:
    rows, targets = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    design = np.concatenate([rows.numpy(), np.ones((20, 1))], axis=1)
    stacked = np.concatenate([design, np.sqrt(0.3) * np.eye(5)])
    expected = np.linalg.lstsq(stacked, np.concatenate([targets.numpy(), np.zeros((5, 2))]), rcond=None)[0]
    assert np.allclose(ridge(rows, targets, 0.3), expected, atol=1e-6)
