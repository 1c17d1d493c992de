"""What the numbers say, in sentences."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from qrlora.adapter import is_gated
from qrlora.analysis._report import Measure, Pair
from qrlora.analysis._usage import ExpertUsage, are_comparable
from qrlora.formats import Adapter
from qrlora.merging import NORM_RATIO_LIMIT

_SURE = 4.0
"""Standard deviations from the random mean at which a value is called no chance."""
_LISTED = 3
_COSINE = "update.cosine"


def number(value: float) -> str:
    """Three digits, with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")


def chance(measure: Measure) -> str:
    """The random baseline of a measure, "0.012 ± 0.002": to the first digit of the deviation."""
    if measure.random_mean is None or measure.random_std is None:
        return "—"
    if not measure.random_std:
        return number(measure.random_mean)
    digits = max(0, -math.floor(math.log10(measure.random_std)))
    mean = f"{measure.random_mean:.{digits}f}" if abs(measure.random_mean) >= measure.random_std / 2 else "0"
    return f"{mean} ± {measure.random_std:.{digits}f}".replace("-", "−")


def is_chance(measure: Measure) -> bool | None:
    """Whether a value is what random matrices give, within 4 standard deviations; None where they are not known."""
    if measure.random_mean is None or measure.random_std is None:
        return None
    return abs(measure.value - measure.random_mean) <= _SURE * measure.random_std


def strength_note(names: Sequence[str], pair: Pair) -> str | None:
    """The warning that a merge would drown the weaker of two; None where the norms are near enough."""
    one, two = names[pair.first], names[pair.second]
    if not min(pair.norms):
        zeros = " and ".join(name for name, norm in zip((one, two), pair.norms, strict=True) if not norm)
        return f"The update of {zeros} is zero in these layers: a merge with it changes nothing."
    strong, weak = (one, two) if pair.norms[0] > pair.norms[1] else (two, one)
    ratio = max(pair.norms) / min(pair.norms)
    if ratio <= NORM_RATIO_LIMIT:
        return None
    how = "Merged" if pair.mergeable else "Active together"
    normalize = "merge with --normalize, or " if pair.mergeable else ""
    return (
        f"{strong} is {number(ratio)} times as strong as {weak}. {how} as they are, {weak} will hardly show: "
        f"{normalize}give {weak} a larger weight (up to {number(ratio)} for equal strength)."
    )


def pair_notes(names: Sequence[str], pair: Pair, refusal: str | None) -> list[str]:
    """What to know of two adapters, the most important first; `refusal` is why merge does not take them, if so."""
    one, two = names[pair.first], names[pair.second]
    notes: list[str] = []
    strength = strength_note(names, pair)
    if strength is not None:
        notes.append(strength)
    elif pair.norm_ratio is not None:
        notes.append(
            f"{one} and {two} are about equally strong: their norms are within a factor of {pair.norm_ratio:.2f}."
        )
    if _COSINE in pair.total:
        notes.append(_direction(pair))
    notes.append(_basis(pair, refusal))
    notes += _left_out(one, two, pair)
    return notes


def _direction(pair: Pair) -> str:
    cosine = pair.total[_COSINE]
    seen = f"cosine {number(cosine.value)}; random updates give {chance(cosine)}"
    much = "slightly" if abs(cosine.value) < 0.1 else "in part" if abs(cosine.value) < 0.5 else "largely"
    how = "merged" if pair.mergeable else "together"
    if is_chance(cosine) is not False:
        whole = f"As a whole the updates are as unrelated as random ones ({seen})."
    elif cosine.value > 0:
        whole = f"As a whole the updates point {much} the same way ({seen}); {how}, that adds up."
    else:
        whole = f"As a whole the updates point {much} against each other ({seen}); {how}, that cancels."
    beyond = sum(is_chance(entry.measures[_COSINE]) is False for entry in pair.layers if _COSINE in entry.measures)
    return (
        f"{whole} Layer by layer it runs from {number(cosine.min)} to {number(cosine.max)}, beyond chance in {beyond} "
        f"of {cosine.layers}."
    )


def _basis(pair: Pair, refusal: str | None) -> str:
    if pair.only_first or pair.only_second or pair.other_shape:
        return "They adapt different layers, so merge refuses them; both can be active at once."
    if refusal is not None:
        return f"They do not merge: {refusal}"
    shared = sum(entry.shared_basis for entry in pair.layers)
    first, second = (max(entry.ranks[which] for entry in pair.layers) for which in (0, 1))
    if shared == len(pair.layers):
        return f"They share one stored basis in every layer, so they merge exactly by sum, at rank {first}."
    some = f"share a stored basis in {shared} of {len(pair.layers)} layers only" if shared else "share no stored basis"
    return f"They {some}, so they merge exactly by concat, at rank {first} + {second} = {first + second}."


def _left_out(one: str, two: str, pair: Pair) -> list[str]:
    notes: list[str] = []
    for name, layers in ((one, pair.only_first), (two, pair.only_second)):
        if layers:
            notes.append(f"{_count(layers)} only {name} adapts {_are(layers)} not compared: {_listed(layers)}.")
    if pair.other_shape:
        layers = pair.other_shape
        notes.append(f"{_count(layers)} of different shapes {_are(layers)} not compared: {_listed(layers)}.")
    if "lora_B.cka" in pair.total:
        notes.append(
            "They have no basis on one side, so their factors lora_B and lora_A are compared as they stand. Factors of "
            "a plain LoRA are not unique (B G and G⁻¹ A give the same update): trust the updates and the angles more."
        )
    if any(entry.ranks[0] != entry.ranks[1] for entry in pair.layers):
        notes.append("Where the ranks differ, only the linear CKA of the factors is defined.")
    return notes


def report_notes(adapters: Mapping[str, Adapter], pairs: Sequence[Pair], *, with_base: bool) -> list[str]:
    """What concerns all: what was left out, and why."""
    notes: list[str] = []
    if not with_base and any("Q.cka" in pair.total for pair in pairs):
        notes.append(
            "R = QᵀW, what the base itself has along the basis, is left out, since it needs the base model: add "
            "--model (--model embedded for the embedded one)."
        )
    gated = [name for name, adapter in adapters.items() if adapter.own]
    if gated:
        notes.append(
            f"{', '.join(gated)}: more than a low-rank pair (gates or other tensors of its own). The numbers are those "
            "of its pair alone, as if every gate were fully open."
        )
    words = [name for name, adapter in adapters.items() if adapter.companions]
    if words:
        notes.append(
            f"{', '.join(words)}: the adapters of text encoders are left out. In Python, "
            'analyze([one.companions["text_encoder"], ...]) compares them.'
        )
    return notes


def usage_notes(adapters: Mapping[str, Adapter], usages: Sequence[ExpertUsage]) -> list[str]:
    """What is missing of expert usage, and why."""
    gated = [name for name, adapter in adapters.items() if is_gated(adapter)]
    if gated and not usages:
        left_out = (
            f"How the gates of {joined(gated)} use their experts is left out, since that shows only while pictures are "
            "drawn: add --model, and --prompt where a file names no captions (or --usage, as recorded before)."
        )
        return [left_out]
    return [
        (
            f"The expert usages of {one.name} and {two.name} are not compared: they have no layer in common, or other "
            "numbers of experts."
        )
        for one, two in combinations(usages, 2)
        if not are_comparable(one, two)
    ]


def joined(names: Sequence[str]) -> str:
    """`dog`, `dog and ink`, `dog, ink and pen`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _count(layers: Sequence[str]) -> str:
    return f"{len(layers)} layer{'s' * (len(layers) != 1)}"


def _are(layers: Sequence[str]) -> str:
    return "are" if len(layers) != 1 else "is"


def _listed(layers: Sequence[str]) -> str:
    more = f" and {len(layers) - _LISTED} more" if len(layers) > _LISTED else ""
    return ", ".join(layers[:_LISTED]) + more
