"""The pictures the embedded base learns from, each with the parts of its caption."""

import multiprocessing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tools.emoji.dataset import Emoji
from tools.emoji.treatments import TREATMENTS
from tools.starter.run import batches

PLAIN = -1
CONTENTS = 500  # two CPU cores draw 500 contents well in the time in which they leave 700 as blobs


@dataclass(frozen=True)
class Pictures:
    """Pictures with the indices of their parts: `names[name]`, `styles[style]`, `treatments[treatment]` (-1: none).

    Args:
        pictures: uint8 [N, H, W, 3].
        name, style, treatment: int64 [N].
    """

    pictures: np.ndarray
    name: np.ndarray
    style: np.ndarray
    treatment: np.ndarray
    names: list[str]
    styles: list[str]
    treatments: list[str]
    keys: list[str]


def drawn_contents(emoji: Emoji) -> list[str]:
    """Training contents that all training styles draw, without signs and buttons, which are mostly lettering."""
    drawn = (c for c in emoji.train_contents if emoji.category(c) != "symbols")
    return [c for c in drawn if all((c, style) in emoji for style in emoji.train_styles)]


def training_contents(emoji: Emoji) -> list[str]:
    """The `CONTENTS` that the base learns, spread evenly over those drawn in all training styles."""
    drawn = drawn_contents(emoji)
    return [drawn[i * len(drawn) // CONTENTS] for i in range(min(CONTENTS, len(drawn)))]


def training_pictures(emoji: Emoji) -> Pictures:
    """Every training content in every training style, plain and in every training treatment."""
    keys = training_contents(emoji)
    pairs = emoji.pairs(keys, emoji.train_styles)
    plain = emoji.pictures(pairs)
    treatments = [t.name for t in TREATMENTS.values() if t.role == "train"]
    with multiprocessing.Pool() as pool:
        treated = [np.stack(pool.map(partial(_treat, name), plain, chunksize=64)) for name in treatments]
    repeats = 1 + len(treatments)
    return Pictures(
        pictures=np.concatenate([plain, *treated]),
        name=np.tile([keys.index(content) for content, _ in pairs], repeats),
        style=np.tile([emoji.train_styles.index(style) for _, style in pairs], repeats),
        treatment=np.repeat(np.arange(PLAIN, len(treatments)), len(pairs)),
        names=[emoji.name(key) for key in keys],
        styles=list(emoji.train_styles),
        treatments=[TREATMENTS[name].words for name in treatments],
        keys=keys,
    )


def _treat(name: str, picture: np.ndarray) -> np.ndarray:
    return TREATMENTS[name].apply(picture)


def load_or_make(emoji: Emoji, path: Path) -> Pictures:
    """The training pictures, kept in `path` (npz, nothing pickled) since the treatments take a minute or two."""
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            lists = {k: file[k].tolist() for k in ("names", "styles", "treatments", "keys")}
            if lists["keys"] != training_contents(emoji):
                raise SystemExit(f"{path} holds other contents than are trained on now; remove {path.parent}.")
            return Pictures(**{k: file[k] for k in ("pictures", "name", "style", "treatment")}, **lists)
    made = training_pictures(emoji)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: np.asarray(v) for k, v in vars(made).items()})
    return made


def mixed(treatment: np.ndarray, size: int, treated: int, seed: int, step: int) -> Tensor:
    """Indices of a step's batch, `treated` of its `size` pictures treated ones, each kind shuffled anew every epoch."""
    plain = int((treatment == PLAIN).sum())
    first = batches(plain, size - treated, seed, step)
    second = plain + batches(len(treatment) - plain, treated, seed + 1, step)
    return torch.cat([first, second])
