"""How pictures of a report lie to one another: which scores are the main ones, and grids of two weights."""

from collections import Counter
from dataclasses import dataclass

from qrlora.evaluation._report import Group, Report

_STYLE_ORDER = ("csd", "look")
_CONTENT_ORDER = ("dinov2", "efficientnet", "clip")
MOST_ROWS = 24
"""Groups that bars and colours still tell apart."""


@dataclass(frozen=True)
class WeightGrid:
    """Groups by the weights of two adapters; None where one is missing.

    Attributes:
        names: of the adapters: rows, columns.
        rows, columns: their weights, ascending.
        groups: by row and column.
    """

    names: tuple[str, str]
    rows: list[float]
    columns: list[float]
    groups: list[list[Group | None]]

    def values(self, measure: str) -> list[list[float | None]]:
        """A measure's means by row and column."""
        return [
            [group.means[measure].mean if group is not None and measure in group.means else None for group in row]
            for row in self.groups
        ]


def main_measure(report: Report, role: str) -> str | None:
    """The measure of a role that figures show: the field's own metric where it was used, centred where it could be."""
    order = _CONTENT_ORDER if role == "content" else _STYLE_ORDER
    for prefix in (f"{role}_centred", role):
        of_role = [name for name in report.measures if name.split(".")[0] == prefix]
        known = [f"{prefix}.{metric}" for metric in order if f"{prefix}.{metric}" in of_role]
        if of_role:
            return (known or of_role)[0]
    return None


def weight_grid(report: Report) -> WeightGrid | None:
    """The grid of a blend: two adapters, at two weights or more each, most of whose pairs are there.

    Pictures of the most frequent prompt count alone.
    """
    prompts = Counter(row.prompt for row in report.pictures)
    if not prompts:
        return None
    common = prompts.most_common(1)[0][0]
    names = {row.group for row in report.pictures if row.prompt == common}
    groups = [group for group in report.groups if group.name in names and len(group.weights) == 2]
    if not groups or any(group.weights.keys() != groups[0].weights.keys() for group in groups):
        return None
    first, second = sorted(groups[0].weights, key=lambda name: ("style" in name, name))
    places = {(group.weights[first], group.weights[second]): group for group in reversed(groups)}
    rows, columns = (sorted({place[side] for place in places}) for side in (0, 1))
    if min(len(rows), len(columns)) < 2 or 2 * len(places) <= len(rows) * len(columns):
        return None
    if len(rows) * len(columns) < 6:  # with and without each of two adapters is a comparison of four groups, no grid
        return None
    return WeightGrid((first, second), rows, columns, [[places.get((r, c)) for c in columns] for r in rows])
