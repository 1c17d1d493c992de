"""A report of pictures whose features are known: a metric that sees mean colours."""

import json
import re
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.errors import QrloraError
from qrlora.evaluation import DriftPair, Metric, Report, Sample, evaluate, write_report

WORDS = {"reddish": (1.0, 0.2, 0.2), "green": (0.0, 1.0, 0.0)}


class Colours(Metric):
    """The mean colour is the feature, for whatever aspects it is given."""

    name = "colours"
    about = "mean colours"
    model = "no network"

    def __init__(self, *aspects: str) -> None:
        self.aspects = aspects  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def load(cls, model: str | None) -> Self:
        raise NotImplementedError

    def _pixels(self, picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(picture).copy()).float().mean(dim=(0, 1))

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def text_features(self, texts: list[str]) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.tensor([WORDS[text] for text in texts])


def sample(name: str, colour: tuple[int, int, int], **more: object) -> Sample:
    return Sample(name, Image.new("RGB", (20, 24), colour), **more)  # pyright: ignore[reportArgumentType]


def cosine(one: tuple[float, ...], other: tuple[float, ...], off: tuple[float, ...] = (0, 0, 0)) -> float:
    a, b = np.subtract(one, off), np.subtract(other, off)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


COLOURS = [(200, 40, 30), (90, 120, 10), (10, 40, 220), (180, 180, 20)]
CONTENT, STYLE = (220, 10, 10), (20, 20, 240)


@pytest.fixture
def pictures() -> list[Sample]:
    """Two seeds by the base, two by adapters."""
    groups = ["base", "base", "dog 1", "dog 1"]
    return [
        sample(f"p{i}", colour, group=groups[i], prompt="<c>", seed=i % 2, text="reddish", weights={"dog": i // 2})
        for i, colour in enumerate(COLOURS)
    ]


def test_every_score_follows_its_formula(pictures: list[Sample]) -> None:
    report = evaluate(
        pictures,
        [Colours("content", "text"), Colours("style")],
        content=[sample("a", CONTENT), sample("b", STYLE)],
        style=[sample("c", STYLE)],
        truth={each.name: sample("t", (100, 100, 100)) for each in pictures},
        base="base",
    )
    for row, colour in zip(report.pictures, COLOURS, strict=True):
        assert row.scores["content.colours"] == pytest.approx((cosine(colour, CONTENT) + cosine(colour, STYLE)) / 2)
        assert row.scores["style.colours"] == pytest.approx(cosine(colour, STYLE))
        assert row.scores["text.colours"] == pytest.approx(cosine(colour, WORDS["reddish"]))
        assert row.scores["truth.colours"] == pytest.approx(1 - cosine(colour, (1, 1, 1)))
        # Flat pictures have no gradients, so that half of every scale is the difference of colours.
        expected = np.abs(np.subtract(colour, 100)).mean() / 255 / 2
        assert row.scores["truth.pixels"] == pytest.approx(expected, abs=1e-6)
    assert report.measures["style.colours"].other == pytest.approx((cosine(CONTENT, STYLE) + 1) / 2)
    style = [cosine(colour, STYLE) for colour in COLOURS]
    base, adapted = report.groups
    assert (base.means["style.colours"].mean, adapted.means["style.colours"].mean) == (
        pytest.approx(np.mean(style[:2])),
        pytest.approx(np.mean(style[2:])),
    )
    (difference,) = report.differences
    moved = np.subtract(style[2:], style[:2])
    found = difference.means["style.colours"]
    assert (difference.group, found.mean, found.pictures) == ("dog 1", pytest.approx(moved.mean()), 2)
    assert (found.low, found.high) == (pytest.approx(moved.min()), pytest.approx(moved.max()))


@pytest.mark.parametrize("count", [4, 10])
def test_a_gallery_says_which_thing_it_is(pictures: list[Sample], count: int) -> None:
    things = {"red": CONTENT, "blue": STYLE, "olive": (90, 90, 0), "green": (0, 200, 0)}
    things |= {f"grey {i}": (120 + i, 120, 125 - i) for i in range(count - len(things))}
    gallery = [sample(name, colour) for name, colour in things.items()]
    report = evaluate(pictures, [Colours("content")], content=[sample("red", CONTENT)], gallery=gallery)
    off = tuple(np.mean(list(things.values()), axis=0)) if count == 10 else (0, 0, 0)
    for row, colour in zip(report.pictures, COLOURS, strict=True):
        said = max(things, key=lambda name: cosine(colour, things[name], off))
        assert row.nearest == {"colours": said}
        assert row.scores["gallery.colours"] == float(said == "red")
        assert ("content_centred.colours" in row.scores) == (count == 10)
        if count == 10:
            assert row.scores["content_centred.colours"] == pytest.approx(cosine(colour, CONTENT, off))
    assert (report.wanted, report.centred) == ("red", count == 10)
    assert any("from 10 on" in note for note in report.notes) == (count == 4)


def test_names_that_do_not_tell_are_said_so(pictures: list[Sample]) -> None:
    gallery = [sample("red", CONTENT), sample("blue", STYLE)]
    report = evaluate(pictures, [Colours("content")], content=[sample("dog", CONTENT)], gallery=gallery)
    assert report.wanted is None
    assert any("no one picture called as the content (dog)" in note for note in report.notes)
    assert "gallery.colours" not in report.measures
    assert {row.nearest["colours"] for row in report.pictures} <= {"red", "blue"}


def test_drift_is_one_minus_the_mean_cosine() -> None:
    colours = [((200, 10, 10), (10, 200, 10)), ((50, 60, 70), (50, 60, 70)), ((90, 0, 0), (90, 90, 0))]
    pairs = [DriftPair(f"{i}", i, *(sample("", each).image for each in pair)) for i, pair in enumerate(colours)]
    (drift,) = evaluate([], [Colours("content"), Colours("style")], drift=pairs).drift
    expected = [1 - cosine(*pair) for pair in colours]
    assert drift.values == pytest.approx(expected)
    assert drift.mean.mean == pytest.approx(1 - np.mean([cosine(*pair) for pair in colours]))
    assert drift.mean.pictures == 3


def grid_of_weights() -> list[Sample]:
    return [
        sample(
            f"{c}-{s}",
            (50 + 80 * c, 60, 50 + 80 * s),
            group=f"content {c}, style {s}",
            prompt="x",
            seed=0,
            weights={"content": c, "style": s},
        )
        for c in (0, 1, 2)
        for s in (0, 1)
    ]


@pytest.mark.parametrize("kind", ["groups", "grid"])
def test_the_page_needs_nothing_but_itself(pictures: list[Sample], tmp_path: Path, kind: str) -> None:
    shown = pictures if kind == "groups" else grid_of_weights()
    content, style = [sample("<dog>", CONTENT)], [sample("ink", STYLE)]
    drift = [DriftPair("a tree", 3, shown[0].image, shown[1].image)]
    report = evaluate(
        shown,
        [Colours("content"), Colours("style")],
        content=content,
        style=style,
        gallery=[sample("<dog>", CONTENT), sample("sky", STYLE)],
        drift=drift,
        base="base",
    )
    page = write_report(report, tmp_path / "r", shown, content=content, style=style, drift=drift)
    text = page.read_text()
    assert not re.search(r"https?://|<script|<dog>", text)
    assert "is no ground truth" in text
    for measure in report.measures.values():
        assert measure.text.replace("'", "&#x27;") in text
    plot = "scores" if kind == "groups" else "weights"
    names = {f"{name}.png" for name in ("references", "pictures", "content-style", plot, "gallery", "drift")}
    assert {path.name for path in page.parent.glob("*.png")} == names
    for name in names:
        with Image.open(page.parent / name) as image:
            image.load()
    assert Report.model_validate(json.loads((page.parent / "report.json").read_text())) == report


def test_a_report_is_the_same_again(pictures: list[Sample], tmp_path: Path) -> None:
    pages = []
    for name in ("one", "two"):
        report = evaluate(pictures, [Colours("content")], content=[sample("red", CONTENT)], seed=5)
        pages.append(write_report(report, tmp_path / name, pictures).read_bytes())
    assert pages[0] == pages[1]


def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, colour in (("made", COLOURS[0]), ("dog", CONTENT), ("ink", STYLE)):
        sample(name, colour).image.save(f"{name}.png")
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    code = text.split("## In Python")[1]
    lines = [line[4:] for line in code.splitlines() if line.startswith("    ") or not line]
    exec(compile("\n".join(lines), "evaluation.md", "exec"), {})  # it is our own text
    assert (tmp_path / "report" / "report.html").is_file()


def test_refusals(pictures: list[Sample]) -> None:
    content = [sample("red", CONTENT)]
    with pytest.raises(QrloraError, match="nothing to evaluate"):
        evaluate([], [Colours("content")], content=content)
    with pytest.raises(QrloraError, match="nothing to compare the pictures with"):
        evaluate(pictures, [Colours("style")], content=[])
    with pytest.raises(QrloraError, match="two pictures are called p0"):
        evaluate([pictures[0], pictures[0]], [Colours("content")], content=content)
    with pytest.raises(QrloraError, match="p1 has no true picture"):
        evaluate(pictures, [Colours("content")], truth={"p0": content[0]})
    with pytest.raises(QrloraError, match="gallery has no picture called cat"):
        evaluate(pictures, [Colours("content")], gallery=content, wanted="cat")
    with pytest.raises(QrloraError, match="drift is measured by a metric of content"):
        evaluate([], [Colours("style")], drift=[DriftPair("x", 0, content[0].image, content[0].image)])
