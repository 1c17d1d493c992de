"""`qrlora evaluate`: scores of pictures, or of what adapters draw, as a report."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from qrlora.cli._options import flag, parse_options, refuse_existing, say
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.blend import Trial
    from qrlora.evaluation import Metric, Sample

NUM_IMAGES = 4


class EvaluateOptions(BaseModel):
    """Score pictures: like the content, like the style, like the words, like the truth; and adapters by their drift.

    With pictures (files, folders, the folder of a blend) those are scored. With --adapter pictures are drawn first, by
    the base, by each adapter and by all together. The folder holds report.html (by itself: pictures are in it), the
    plots, the pictures that were drawn, and all numbers in report.json.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Pictures, folders of pictures, or the folder of a blend."""
    output: Path
    """The report's folder."""
    content: tuple[Path, ...] = ()
    """Pictures of the thing, or a folder; those that a blend was made from where not given."""
    style: tuple[Path, ...] = ()
    """Pictures in the style, or a folder; those that a blend was made from where not given."""
    truth: Path | None = None
    """The right picture, or a folder with one of each picture's name."""
    gallery: Path | None = None
    """Folder with one picture each of the things a picture could be taken for, named by them. From ten on their mean
    is taken off features, which makes likenesses tell more."""
    wanted: str | None = None
    """The right thing's name in the gallery; the content picture's where not given."""
    text: str | None = None
    """What the pictures should show, in plain words, for the metric clip; their prompts where not given."""
    metrics: tuple[str, ...] = ("efficientnet", "look")
    """Of content efficientnet, dinov2, clip; of style look, csd; of the words clip. efficientnet and look work
    offline."""
    metric_model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """METRIC=FOLDER or METRIC=ID: what dinov2, clip or csd computes with; adds the metric. May be given several
    times."""
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """FILE, FILE=WEIGHT or FILE=WEIGHT@LOW-HIGH, to draw with; may be given several times."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What to draw, such as "a <c> dog in <s> style"; may be given several times."""
    num_images: int | None = Field(default=None, gt=0)
    """Pictures of each prompt, 4 where not given; each has the next seed, the same ones with and without adapters."""
    drift_prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A prompt that has nothing to do with the adapters; may be given several times. None: ten of our own."""
    no_drift: bool = False
    """Do not draw pictures for drift."""
    seed: int = Field(default=0, ge=0, lt=2**62)
    """Of the first picture, and of the bootstrap."""
    model: str | None = None
    """Hub id or local diffusers folder to draw with; none means the embedded base."""
    device: str | None = None
    """cpu, cuda, mps...; none means the best that is there."""
    memory: Literal["6gb", "8gb", "12gb", "16gb", "24gb", "max"] | None = None
    """For a card of that size, as in generate."""
    height: int | None = Field(default=None, gt=0)
    """In pixels."""
    width: int | None = Field(default=None, gt=0)
    num_inference_steps: int | None = Field(default=None, gt=0)
    guidance_scale: float | None = Field(default=None, allow_inf_nan=False)
    """As the model's own pipeline means it."""
    true_cfg_scale: float | None = Field(default=None, allow_inf_nan=False)
    """Classifier-free guidance on FLUX; 1 is off."""
    negative_prompt: str | None = None
    """What classifier-free guidance guides away from."""
    max_sequence_length: int | None = Field(default=None, gt=0)
    resamples: int = Field(default=10_000, ge=100, le=1_000_000)
    """Of the bootstrap."""
    overwrite: bool = False
    """Write into the folder though it is there."""


_FOR_DRAWING = (
    "prompt",
    "drift_prompt",
    "no_drift",
    "num_images",
    "model",
    "memory",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "negative_prompt",
    "max_sequence_length",
)


def run(arguments: Sequence[str]) -> None:
    """Parse, draw where that is wanted, score, and say where the report is."""
    options = parse_options(EvaluateOptions, "evaluate", arguments)
    _check(options)
    refuse_existing(options.output, options.overwrite)
    models = _metric_models(options.metric_model)
    started = time.perf_counter()
    from qrlora.blend import choose_place, read_samples, reference_samples, truth_samples
    from qrlora.evaluation import evaluate, load_metrics, write_report

    metrics = load_metrics(list(dict.fromkeys([*options.metrics, *models])), models)
    place, _ = choose_place(options.device)
    read = read_samples(options.pictures, options.text) if options.pictures else None
    content, style = (
        reference_samples(given or ((found,) if found is not None else ()), option)
        for given, found, option in (
            (options.content, read.content if read is not None else None, "--content"),
            (options.style, read.style if read is not None else None, "--style"),
        )
    )
    gallery = reference_samples((options.gallery,), "--gallery") if options.gallery is not None else []
    _check_compared(options, metrics, content, style)
    truth = truth_samples(options.truth, read.samples) if options.truth is not None and read is not None else None
    trial = _draw(options) if read is None else None
    pictures: list[Sample] = trial.samples if trial is not None else read.samples if read is not None else []
    if options.truth is not None and trial is not None:
        truth = truth_samples(options.truth, pictures)
    for metric in metrics:
        metric.to(place)
    drift = trial.drift if trial is not None else []
    report = evaluate(
        pictures,
        metrics,
        content=content,
        style=style,
        truth=truth,
        gallery=gallery,
        wanted=options.wanted,
        drift=drift,
        base="base",
        notes=read.notes if read is not None else (),
        seed=options.seed,
        resamples=options.resamples,
        progress=lambda name: say(f"scoring by {name}"),
    )
    page = write_report(report, options.output, pictures, content=content, style=style, drift=drift)
    say(f"{len(pictures)} pictures, {len(report.measures)} measures, {time.perf_counter() - started:.1f} s")
    print(page)


def _check(options: EvaluateOptions) -> None:
    if options.pictures and options.adapter:
        raise QrloraError("give pictures to be scored or --adapter to draw them with, not both.")
    if not options.pictures and not options.adapter:
        raise QrloraError("what is to be scored? Give pictures, the folder of a blend, or --adapter and --prompt.")
    if options.adapter and not options.prompt:
        raise QrloraError('say what to draw: --prompt "a <c> dog in <s> style".')
    if options.pictures:
        for name in _FOR_DRAWING:
            if getattr(options, name) not in (None, (), False):
                raise QrloraError(f"{flag(name)} is for drawing with --adapter, but pictures are given; drop it.")
    if options.drift_prompt and options.no_drift:
        raise QrloraError("--drift-prompt and --no-drift exclude each other; drop one.")
    if options.wanted is not None and options.gallery is None:
        raise QrloraError("--wanted names a picture of the gallery; add --gallery FOLDER.")


def _metric_models(given: Sequence[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not (equals and name and model):
            raise QrloraError(f"--metric-model {text} is not METRIC=FOLDER or METRIC=ID, such as dinov2=dinov2-base.")
        if name in models:
            raise QrloraError(f"--metric-model names {name} twice; drop one.")
        models[name] = model
    return models


def _check_compared(
    options: EvaluateOptions, metrics: Sequence["Metric"], content: Sequence["Sample"], style: Sequence["Sample"]
) -> None:
    """What nothing could be compared with is told before anything is drawn."""
    aspects = {aspect for metric in metrics for aspect in metric.aspects}
    if not (content or style or options.truth or options.gallery or "text" in aspects):
        raise QrloraError(
            "there is nothing to compare the pictures with; give --content, --style, --truth or --gallery (or the "
            "words they should show, with --metrics clip)."
        )
    named = " ".join(metric.name for metric in metrics)
    for role, given in (("content", content), ("style", style)):
        if given and role not in aspects:
            better = "efficientnet" if role == "content" else "look"
            raise QrloraError(f"--metrics {named} has no metric of {role}, which is to be compared; add {better}.")


def _draw(options: EvaluateOptions) -> "Trial":
    from qrlora.analysis import short_names
    from qrlora.blend import draw_trial, drift_prompts, load_painter, settings_of
    from qrlora.blend.trial import TrialAdapter
    from qrlora.cli.generate import split_adapter
    from qrlora.training.memory import enough_to

    given = [split_adapter(text) for text in options.adapter]
    names = short_names([each.file for each in given])
    painter = load_painter(options.model, options.device, options.memory)
    painter.settings = settings_of(options, painter.settings, painter.loaded)
    unrelated = () if options.no_drift else options.drift_prompt or drift_prompts(options.model)
    started = shown = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done == 1:
            say(f"drawing {total} pictures")
        if done < total and time.perf_counter() - shown > 15:
            shown = time.perf_counter()
            say(f"{done}/{total} pictures, {(shown - started) / done * (total - done):.0f} s left")

    with enough_to("draw", options.memory):
        return draw_trial(
            painter,
            {name: TrialAdapter(*each) for name, each in zip(names, given, strict=True)},
            list(dict.fromkeys(options.prompt)),
            range(options.seed, options.seed + (options.num_images or NUM_IMAGES)),
            list(dict.fromkeys(unrelated)),
            text=options.text,
            folder=options.output / "pictures",
            progress=progress,
        )
