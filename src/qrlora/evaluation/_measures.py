"""What each kind of score is, in words."""

from qrlora.evaluation._metric import Metric
from qrlora.evaluation._report import Measure


def similarity_measure(role: str, metric: Metric, *, centred: bool = False) -> Measure:
    """Cosine with the picture of a role."""
    centre = (
        " The mean of the gallery's features is taken off first, so that what all its pictures have in common does not "
        "count: 0 is then an average thing of the gallery."
        if centred
        else ""
    )
    return Measure(
        title=f"{role} ({metric.name}{', centred' if centred else ''})",
        metric=metric.name,
        model=metric.model,
        lowest=-1.0 if centred else metric.lowest,
        highest=1.0,
        better="higher",
        text=f"Likeness to the {role} picture: the cosine of {metric.about}, the mean where there are several. 1 is "
        f"the very same, also for a mere copy of it.{centre}",
    )


def text_measure(metric: Metric) -> Measure:
    return Measure(
        title=f"text ({metric.name})",
        metric=metric.name,
        model=metric.model,
        lowest=-1.0,
        highest=1.0,
        better="higher",
        text=f"How well the picture fits the words: the cosine in {metric.about}. Even a picture that fits perfectly "
        "stays far below 1, so compare groups with one another alone.",
    )


def truth_measure(metric: Metric, *, centred: bool) -> Measure:
    return Measure(
        title=f"off the truth ({metric.name})",
        metric=metric.name,
        model=metric.model,
        lowest=0.0,
        highest=2.0 if centred else 1.0 - metric.lowest,
        better="lower",
        text=f"Distance to the true picture: 1 minus the cosine of {metric.about}"
        f"{', both centred by the mean of the gallery' if centred else ''}.",
    )


PIXELS = Measure(
    title="off the truth (pixels)",
    metric="",
    model="",
    lowest=0.0,
    highest=1.0,
    better="lower",
    text="Distance to the true picture: mean absolute difference of colours and of edges, at full size and halved "
    "three times. A thing that is right but elsewhere in the picture counts as wrong.",
)
LOOK = Measure(
    title="off the truth (look)",
    metric="",
    model="",
    lowest=0.0,
    highest=1.0,
    better="lower",
    text="Distance to the true picture: Hellinger distance of histograms of colours, edges and neighbouring pixels at "
    "64 x 64. Where things are does not count.",
)


def gallery_measure(metric: Metric, count: int, *, centred: bool) -> Measure:
    return Measure(
        title=f"taken for the right thing ({metric.name})",
        metric=metric.name,
        model=metric.model,
        lowest=0.0,
        highest=1.0,
        better="higher",
        text=f"1 where, among the {count} pictures of the gallery, the right thing's is the nearest by the cosine of "
        f"{metric.about}{' after the mean of the gallery is taken off' if centred else ''}; its mean is the share that "
        f"is right. Guessing gives {1 / count:.3g}.",
    )
