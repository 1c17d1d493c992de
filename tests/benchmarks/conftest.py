"""A synthetic data set on the embedded base: squares, discs and stripes (contents) in a few colours (styles)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.fusion.bench import Bench
from benchmarks.fusion.config import Method, Plan, Stage, Steps, load_plan
from benchmarks.fusion.scores import Scorer
from benchmarks.fusion.splits import Splits
from benchmarks.fusion.store import Progress, Store
from qrlora import starter
from qrlora.models import LoadedModel, load_pipeline
from tools.emoji.dataset import Emoji
from tools.emoji.scores import Judge

SIDE = 64
STYLES = {"noto": "train", "twemoji": "train", "fluent-3d": "held-out", "openmoji": "held-out"}
COLOURS = ((230, 60, 40), (40, 90, 220), (60, 170, 80), (20, 20, 20))
CONTENTS = {"train": 14, "dev": 3, "test": 3}


def drawn(content: int, style: int) -> np.ndarray:
    """A disc or a square, its place and size by the content, its colour by the style."""
    y, x = np.mgrid[:SIDE, :SIDE]
    centre, size = (12 + 5 * (content % 8), 12 + 4 * (content % 11)), 6 + content % 5 * 3
    dx, dy = abs(x - centre[0]), abs(y - centre[1])
    inside = dx**2 + dy**2 < size**2 if content % 2 else np.maximum(dx, dy) < size
    picture = np.full((SIDE, SIDE, 3), 255, np.uint8)
    picture[inside] = COLOURS[style]
    return picture


@pytest.fixture(scope="session")
def emoji() -> Emoji:
    starts = {"train": 0x100, "dev": 0x200, "test": 0x300}
    keys = [(f"{starts[split] + i:x}", split) for split, count in CONTENTS.items() for i in range(count)]
    pairs = [(c, s) for c in range(len(keys)) for s in range(len(STYLES))]
    contents = [{"key": key, "name": f"thing {key}", "category": "objects", "split": split} for key, split in keys]
    styles = [{"name": name, "role": role} for name, role in STYLES.items()]
    arrays = np.stack([drawn(c, s) for c, s in pairs])
    content, style = np.array([c for c, _ in pairs]), np.array([s for _, s in pairs])
    return Emoji.of(arrays, style, content, {"size": SIDE, "styles": styles, "contents": contents})


def features(pictures: np.ndarray) -> torch.Tensor:
    """Mean darkness in 8 x 8 places."""
    dark = 255 - torch.from_numpy(np.ascontiguousarray(pictures)).float().mean(dim=3)
    return torch.nn.functional.avg_pool2d(dark[:, None], 8).flatten(1)


@pytest.fixture(scope="session")
def splits(emoji: Emoji) -> Splits:
    known = emoji.train_contents
    return Splits(
        content_style="noto",
        taught=known[:8],
        shown=known[8:12],
        unrelated=((known[12], "noto"), (known[13], "twemoji")),
        styles=("fluent-3d", "openmoji"),
        dev=emoji.dev_contents,
        test=emoji.test_contents,
    )


@pytest.fixture(scope="session")
def base() -> LoadedModel:
    """The embedded base, drawing in two steps."""
    model = load_pipeline(starter.path())
    return dataclasses.replace(model, defaults=model.defaults.model_copy(update={"num_inference_steps": 2}))


@pytest.fixture(scope="session")
def scorer(emoji: Emoji, splits: Splits) -> Scorer:
    judged = [*emoji.dev_contents, *emoji.test_contents, *splits.taught, *splits.shown]
    judge = Judge.make(emoji, features, emoji.styles, judged)  # pyright: ignore[reportArgumentType]
    return Scorer(judge, emoji.dev_contents, {pair: emoji[pair] for pair in emoji.pairs(judged)})


@pytest.fixture
def plan() -> Plan:
    small = {"basis": "qr", "mask": "full", "rank": 2}
    methods = {
        "qr": Method(about="small", adapter=small, learning_rates=(0.01, 0.02), family="QR"),
        "qr-r1": Method(about="smaller", adapter={**small, "rank": 1}, learning_rates=(0.01,), family="QR"),
        "lora": Method(about="baseline", adapter={"basis": "lora", "rank": 2}, learning_rates=(0.01,)),
        "gated": Method(about="run time", adapter={**small, "experts": 2}, learning_rates=(0.01,)),
    }
    stage = Stage(
        split="dev",
        contents=2,
        styles=1,
        seeds=(0,),
        shots=(1,),
        steps=Steps(content=2, style={1: 2}),
        draws=2,
        batch=1,
        rank=2,
        weights=((0.5, 1.0),),
        keep=(1,),
        keep_of=("qr", "lora"),
        together=2,
    )
    return Plan(methods=methods, merges=load_plan().merges, stages={"screen": stage})


@pytest.fixture
def bench(emoji: Emoji, plan: Plan, splits: Splits, base: LoadedModel, scorer: Scorer, tmp_path: Path) -> Bench:
    store, silent = Store(tmp_path / "store"), Progress(say=lambda _: None)
    return Bench(emoji, plan, splits, plan.stage("screen"), model=base, store=store, scorer=scorer, progress=silent)
