"""Pictures in, a report out."""

from collections.abc import Callable, Mapping, Sequence

from qrlora.errors import QrloraError
from qrlora.evaluation._bootstrap import RESAMPLES, bootstrap_mean
from qrlora.evaluation._metric import Metric, load_metrics
from qrlora.evaluation._report import Difference, Drift, Estimate, Group, PictureScores, Report
from qrlora.evaluation._samples import DriftPair, Sample
from qrlora.evaluation._scores import distance
from qrlora.evaluation._scoring import Scoring, Wanted

Progress = Callable[[str], None]


def evaluate(
    pictures: Sequence[Sample],
    metrics: Sequence[Metric] | None = None,
    *,
    content: Sequence[Sample] = (),
    style: Sequence[Sample] = (),
    truth: Mapping[str, Sample] | None = None,
    gallery: Sequence[Sample] = (),
    wanted: str | None = None,
    drift: Sequence[DriftPair] = (),
    base: str | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Progress | None = None,
) -> Report:
    """Score pictures against what they were made from, and adapters by what they change beside that.

    Args:
        pictures: to be scored, of different names; perhaps none where `drift` is given.
        metrics: from `load_metrics`; `efficientnet` and `look` where None.
        content: the pictured thing, one or more pictures of it.
        style: one or more pictures in the style.
        truth: the right picture, by a picture's name, for all of them.
        gallery: one picture each of the things that a picture can be taken for, by their names. From
            `CENTRED_FROM` pictures on its mean is also taken off features.
        wanted: the right name among the gallery's; where None, that of the content picture if it is there.
        drift: pictures of prompts that have nothing to do with the adapters, without and with them.
        base: the group that others are compared with, picture by picture of the same prompt and seed.
        notes: more sentences for the report.
        seed, resamples: of the bootstrap.
        progress: called with each metric's name before it computes.

    Returns:
        The report; `write_report` makes a page and pictures of it. Drift is `1 - mean cosine` of the pictures with and
        without adapters at the same seeds, as in the image benchmark of peft's method comparison (`measure_drift`),
        whose numbers are by `dinov2`.

    Raises:
        QrloraError: nothing to score, nothing to compare with, a name twice, a picture without its truth, a wanted
            name that the gallery lacks.
    """
    _check(pictures, drift, gallery, wanted)
    used = list(metrics) if metrics is not None else load_metrics()
    scoring = Scoring(list(pictures), content, style, truth, gallery, Wanted.among(gallery, wanted, content))
    found: list[Drift] = []
    for metric in used:
        if progress is not None:
            progress(metric.name)
        scoring.add(metric)
        if drift and "content" in metric.aspects:
            found.append(measure_drift(metric, drift, seed=seed, resamples=resamples))
    scoring.finish()
    if pictures and not (scoring.measures or scoring.places):
        raise QrloraError(
            f"the metrics {', '.join(metric.name for metric in used)} have nothing to compare the pictures with; give "
            "a content picture, a style picture, a true picture or a gallery (and for texts the metric clip)."
        )
    if drift and not found:
        raise QrloraError("drift is measured by a metric of content; add efficientnet, dinov2 or clip.")
    rows, measures = scoring.rows(), scoring.ordered()

    def estimate(values: Sequence[float]) -> Estimate:
        interval = bootstrap_mean(values, resamples=resamples, seed=seed)
        return Estimate(mean=interval.mean, low=interval.low, high=interval.high, pictures=len(values))

    return Report(
        content=[each.name for each in content],
        style=[each.name for each in style],
        gallery=[each.name for each in gallery],
        wanted=scoring.wanted.name,
        centred=scoring.centred,
        measures=measures,
        pictures=rows,
        groups=_groups(rows, list(measures), estimate),
        differences=_differences(rows, list(measures), base, estimate),
        drift=found,
        notes=[*notes, *scoring.notes()],
        seed=seed,
        resamples=resamples,
    )


def measure_drift(metric: Metric, pairs: Sequence[DriftPair], *, seed: int = 0, resamples: int = RESAMPLES) -> Drift:
    """How far adapters move pictures of prompts that have nothing to do with them.

    `1 - cosine` of the features of each two pictures, and its mean: what peft's `measure_drift` gives where the metric
    is `dinov2` (its default model is peft's) and the pictures are as many.

    Args:
        metric: of the aspect `content`.
        pairs: at least one.
        seed, resamples: of the bootstrap over the prompts.
    """
    before, after = (metric.features([getattr(pair, side) for pair in pairs]) for side in ("base", "adapted"))
    values = distance(before, after).tolist()
    interval = bootstrap_mean(values, resamples=resamples, seed=seed)
    return Drift(
        metric=metric.name,
        model=metric.model,
        prompts=[pair.prompt for pair in pairs],
        seeds=[pair.seed for pair in pairs],
        values=values,
        mean=Estimate(mean=interval.mean, low=interval.low, high=interval.high, pictures=len(values)),
    )


def _check(
    pictures: Sequence[Sample], drift: Sequence[DriftPair], gallery: Sequence[Sample], wanted: str | None
) -> None:
    if not pictures and not drift:
        raise QrloraError("there is nothing to evaluate; give at least one picture.")
    for what, samples in (("pictures", pictures), ("pictures of the gallery", gallery)):
        names = [each.name for each in samples]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise QrloraError(f"two {what} are called {twice}; rename one.")
    if wanted is not None and wanted not in [each.name for each in gallery]:
        raise QrloraError(f"the gallery has no picture called {wanted}; name one that it has.")


def _groups(
    rows: Sequence[PictureScores], measures: Sequence[str], estimate: Callable[[Sequence[float]], Estimate]
) -> list[Group]:
    groups: list[Group] = []
    for name in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == name]
        columns = {key: [row.scores[key] for row in members if key in row.scores] for key in measures}
        means = {key: estimate(values) for key, values in columns.items() if values}
        groups.append(Group(name=name, weights=members[0].weights, means=means))
    return groups


def _differences(
    rows: Sequence[PictureScores],
    measures: Sequence[str],
    base: str | None,
    estimate: Callable[[Sequence[float]], Estimate],
) -> list[Difference]:
    """Of every other group from the base, where at least two of its pictures have a partner there."""
    partners = {(row.prompt, row.seed): row for row in rows if row.group == base}
    found: list[Difference] = []
    for name in dict.fromkeys(row.group for row in rows if row.group != base):
        pairs = [
            (row, partners[row.prompt, row.seed])
            for row in rows
            if row.group == name and (row.prompt, row.seed) in partners
        ]
        if base is None or len(pairs) < 2:
            continue
        columns = {
            key: [one.scores[key] - other.scores[key] for one, other in pairs if key in one.scores] for key in measures
        }
        means = {key: estimate(values) for key, values in columns.items() if values}
        found.append(Difference(group=name, base=base, means=means))
    return found
