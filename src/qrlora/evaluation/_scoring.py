"""The scores of all pictures, one metric after another."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qrlora.data import square
from qrlora.errors import QrloraError
from qrlora.evaluation._distances import hellinger, multiscale
from qrlora.evaluation._measures import (
    LOOK,
    PIXELS,
    gallery_measure,
    similarity_measure,
    text_measure,
    truth_measure,
)
from qrlora.evaluation._metric import Metric
from qrlora.evaluation._report import Measure, PictureScores
from qrlora.evaluation._samples import Sample
from qrlora.evaluation._scores import distance, nearest, similarity

CENTRED_FROM = 10
"""Pictures that a gallery has at least where its mean is taken off features: of fewer, the mean is mostly the wanted
thing's own."""
_LOOK_SIDE = 64
_PIXEL_SIDES = (16, 512)
_TRIGGER = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class Wanted:
    """The right name in a gallery, or why none is known."""

    name: str | None = None
    reason: str | None = None

    @classmethod
    def among(cls, gallery: Sequence[Sample], given: str | None, content: Sequence[Sample]) -> "Wanted":
        """`given`, else the one name that the content pictures have in the gallery."""
        if given is not None or not gallery:
            return cls(given)
        names = {each.name for each in gallery} & {each.name for each in content}
        if len(names) == 1:
            return cls(names.pop())
        said = ", ".join(each.name for each in content) or "no content picture"
        return cls(None, f"Right or wrong is not told: the gallery has no one picture called as the content ({said}).")


@dataclass
class Scoring:
    """Scores, filled in by `add` and `finish`.

    Attributes:
        pictures, content, style, truth, gallery, wanted: as `evaluate` has them.
        measures: found so far, by name.
        scores: by measure, one a picture.
        places: nearest of the gallery, by metric.
    """

    pictures: list[Sample]
    content: Sequence[Sample]
    style: Sequence[Sample]
    truth: Mapping[str, Sample] | None
    gallery: Sequence[Sample]
    wanted: Wanted
    measures: dict[str, Measure] = field(default_factory=dict[str, Measure])
    scores: dict[str, dict[int, float]] = field(default_factory=dict[str, dict[int, float]])
    places: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    @property
    def centred(self) -> bool:
        """Whether the gallery is large enough to tell what its pictures have in common."""
        return len(self.gallery) >= CENTRED_FROM

    def add(self, metric: Metric) -> None:
        """Everything that one metric can say of the pictures."""
        if not self.pictures:
            return
        rows = metric.features([each.image for each in self.pictures])
        known: dict[str, Tensor] = {}
        for role, samples in (("content", self.content), ("style", self.style)):
            if samples:
                known[role] = metric.features([each.image for each in samples])
        if "style" in metric.aspects:
            self._similar("style", metric, rows, known)
        if "content" in metric.aspects:
            self._similar("content", metric, rows, known)
            self._content(metric, rows, known)
        if "text" in metric.aspects:
            self._text(metric, rows)

    def _similar(
        self, role: str, metric: Metric, rows: Tensor, known: Mapping[str, Tensor], centre: Tensor | None = None
    ) -> None:
        if role not in known:
            return
        other = known.get("style" if role == "content" else "content")
        measure = similarity_measure(role, metric, centred=centre is not None)
        if other is not None:
            measure = measure.model_copy(update={"other": similarity(other, known[role], centre).mean().item()})
        suffix = "_centred" if centre is not None else ""
        self._put(f"{role}{suffix}.{metric.name}", measure, similarity(rows, known[role], centre))

    def _content(self, metric: Metric, rows: Tensor, known: Mapping[str, Tensor]) -> None:
        drawn = metric.features([each.image for each in self.gallery]) if self.gallery else None
        centre = drawn.mean(dim=0) if drawn is not None and self.centred else None
        if centre is not None:
            self._similar("content", metric, rows, known, centre)
        if self.truth is not None:
            true = metric.features([self._true(each).image for each in self.pictures])
            measure = truth_measure(metric, centred=centre is not None)
            self._put(f"truth.{metric.name}", measure, distance(rows, true, centre))
        if drawn is not None:
            said = [self.gallery[place].name for place in nearest(rows, drawn, centre).tolist()]
            self.places[metric.name] = said
            if self.wanted.name is not None:
                measure = gallery_measure(metric, len(self.gallery), centred=centre is not None)
                right = torch.tensor([float(name == self.wanted.name) for name in said])
                self._put(f"gallery.{metric.name}", measure, right)

    def _text(self, metric: Metric, rows: Tensor) -> None:
        texts = [each.text or each.prompt for each in self.pictures]
        told = [index for index, text in enumerate(texts) if text]
        if not told:
            return
        different = list(dict.fromkeys(texts[index] for index in told))
        read = metric.text_features([text for text in different if text])
        wanted = read[[different.index(texts[index]) for index in told]]
        self._put(f"text.{metric.name}", text_measure(metric), 1 - distance(rows[told], wanted), told)

    def finish(self) -> None:
        """What needs no metric: distances to the true pictures."""
        if self.truth is None or not self.pictures:
            return
        pairs = [(each.image, self._true(each).image) for each in self.pictures]
        self._put("truth.pixels", PIXELS, torch.cat([_pixels(*pair) for pair in pairs]))
        small = [[np.array(square(image, _LOOK_SIDE)) for image in side] for side in zip(*pairs, strict=True)]
        self._put("truth.look", LOOK, hellinger(np.stack(small[0]), np.stack(small[1])))

    def rows(self) -> list[PictureScores]:
        """All of it, a picture at a time."""
        return [
            PictureScores(
                name=each.name,
                group=each.group,
                prompt=each.prompt,
                seed=each.seed,
                weights=dict(each.weights),
                scores={key: values[index] for key, values in self.scores.items() if index in values},
                nearest={metric: said[index] for metric, said in self.places.items()},
            )
            for index, each in enumerate(self.pictures)
        ]

    def notes(self) -> list[str]:
        """What a reader has to know beside the numbers."""
        notes = [self.wanted.reason] if self.wanted.reason is not None else []
        if self.gallery and not self.centred:
            notes.append(
                f"The gallery has {len(self.gallery)} pictures; from {CENTRED_FROM} on their mean would be taken off, "
                "which makes likenesses tell more."
            )
        texts = [each.text or each.prompt or "" for each in self.pictures]
        triggers = sorted({word for text in texts for word in _TRIGGER.findall(text)})
        if triggers and any(key.startswith("text.") for key in self.measures):
            notes.append(
                f"The words contain {', '.join(triggers)}, which mean something to the adapters alone; say in plain "
                "words what the pictures should show (--text)."
            )
        return notes

    def ordered(self) -> dict[str, Measure]:
        """The measures in the order of reading."""
        kinds = ("content", "content_centred", "style", "text", "gallery", "truth")
        return dict(sorted(self.measures.items(), key=lambda item: kinds.index(item[0].split(".")[0])))

    def _put(self, name: str, measure: Measure, values: Tensor, places: Sequence[int] | None = None) -> None:
        found = values.double().tolist()
        self.measures[name] = measure
        self.scores[name] = dict(zip(places if places is not None else range(len(found)), found, strict=True))

    def _true(self, picture: Sample) -> Sample:
        assert self.truth is not None
        if picture.name not in self.truth:
            raise QrloraError(f"{picture.name} has no true picture; give one of that name, or one for all.")
        return self.truth[picture.name]


def _pixels(picture: Image.Image, true: Image.Image) -> Tensor:
    """Both cut to a square of the smaller one's side, within bounds."""
    low, high = _PIXEL_SIDES
    side = min(high, max(low, min(*picture.size, *true.size)))
    one, other = (
        torch.from_numpy(np.array(square(image, side)))[None].permute(0, 3, 1, 2).float() / 255
        for image in (picture, true)
    )
    return multiscale(one, other)
