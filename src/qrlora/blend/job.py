"""The blend itself: train what is not given, merge, lay pictures out, report."""

import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qrlora import starter
from qrlora.blend.checks import check_output, check_plan, run_time_of
from qrlora.blend.config import BlendConfig
from qrlora.blend.painter import Painter, choose_place, settings_of
from qrlora.blend.provenance import has_chunk, save_picture
from qrlora.blend.report import adapter_report, write_report
from qrlora.blend.roles import (
    ROLES,
    Part,
    Role,
    agree_on_memory,
    copy_file,
    fill_trainings,
    plan_parts,
    train_part,
)
from qrlora.blend.sheet import Cell, Grid, draw_sheet, span
from qrlora.blend.sweep import draw_sweep
from qrlora.blend.weights import BlendWeights, weights_of
from qrlora.errors import QrloraWarning
from qrlora.formats import Adapter, read_adapter
from qrlora.merging import WHOLE, NormWarning, merge, merge_options, restricted
from qrlora.models import LoadedModel
from qrlora.training import TrainResult, load_for
from qrlora.training.config import Memory
from qrlora.training.memory import enough_to


@dataclass(frozen=True)
class BlendResult:
    """The files of a blend.

    Attributes:
        content, style: adapter files.
        merged: likewise; None with a method that no file can hold.
        sheet: the labelled picture.
        sweep: the sheet of intermediate checkpoints, where asked for.
        report: the JSON report.
        seconds: by phase, and in total.
    """

    content: Path
    style: Path
    merged: Path | None
    sheet: Path
    sweep: Path | None
    report: Path
    seconds: dict[str, float]


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begun, 2)

    def finish(self) -> None:
        self.seconds["total"] = round(time.perf_counter() - self.started, 2)


def blend(config: BlendConfig, *, loaded: LoadedModel | None = None, progress: bool = True) -> BlendResult:
    """Make two adapters, merge them, and show what they do over a grid of weights.

    Writes into `config.output`: `content.safetensors`, `style.safetensors`, `merged.safetensors` (at `content_weight`
    and `style_weight`; not with a run-time method such as k-lora, which no file can hold), `blend.png`, the single
    pictures under `pictures/` (each repeatable with `qrlora generate --from`), `report.json`, the training runs under
    `train/`, and `sweep.png` where `sweep_steps` is given.

    Args:
        config: what to blend.
        loaded: a model to work on, given back without adapters; loaded from `config.model` where None.
        progress: show the trainings' progress on standard error.

    Raises:
        QrloraError: bad input; nothing is written over.
        Interrupted: Ctrl-C while training; run again with `resume`.
    """
    clock = _Clock()
    output = config.output
    check_output(config)
    parts, prompt = plan_parts(config)
    with clock.phase("load"):
        memory = agree_on_memory(config, parts)
        model = loaded if loaded is not None else _load(config, parts, memory)
    settings, weights = settings_of(config, model.defaults, model), weights_of(config, model)
    fill_trainings(parts, model)
    check_plan(config, parts, model, settings)
    painter = Painter(model, config.model, settings)
    trained: dict[Role, TrainResult | None] = {}
    for role in ROLES:
        _say(progress, f"{role}: {parts[role].source}")
        with clock.phase(role):
            trained[role] = train_part(parts[role], model, progress=progress)
    with clock.phase("merge"):
        adapters: dict[Role, Adapter] = {role: _single(config, parts[role]) for role in ROLES}
        merged, note = _merge(config, weights, adapters, model)
        files: dict[Role, Path] = {role: output / f"{role}.safetensors" for role in ROLES}
        for role in ROLES:
            _write_role(config, parts[role], adapters[role], files[role])
        merged_file = None
        if merged is None:
            (output / "merged.safetensors").unlink(missing_ok=True)  # of an earlier blend, by another method
        else:
            merged_file = merged.save(output / "merged.safetensors")
        if config.timesteps():
            _warn_of_all_timesteps(config, weights)
    attached: list[str] = []
    forget_pictures(output)
    _say(progress, "pictures")
    try:
        with clock.phase("pictures"), enough_to("draw", memory):
            for role in ROLES:
                painter.attach(role, files[role])
                attached.append(role)
            sheet = _draw(config, weights, painter, parts, prompt, _subtitle(config, model, adapters, note))
    finally:
        for name in attached:
            painter.detach(name)
    sweep = None
    if config.sweep_steps is not None:
        _say(progress, "sweep")
        with clock.phase("sweep"), enough_to("draw", memory):
            sweep = draw_sweep(config, painter, parts, files, prompt)
    clock.finish()
    reported = {
        role: adapter_report(adapters[role], files[role], trained[role], parts[role].source, parts[role].prompt)
        for role in ROLES
    }
    whole = {}
    if merged is not None and merged_file is not None:
        made_by = f"{note}; acts at all timesteps" if config.timesteps() else note
        used = {"content": weights.content, "style": weights.style}
        whole = {"merged": adapter_report(merged, merged_file, None, made_by, prompt) | {"weights": used}}
    report = write_report(
        output / "report.json",
        seconds=clock.seconds,
        config=config,
        weights=weights,
        prompt=prompt,
        painter=painter,
        parts={**reported, **whole},
    )
    return BlendResult(files["content"], files["style"], merged_file, sheet, sweep, report, clock.seconds)


def _warn_of_all_timesteps(config: BlendConfig, weights: BlendWeights) -> None:
    used = {"content": weights.content, "style": weights.style}
    ranges = {role: f"@{span(bounds)}" for role, bounds in config.timesteps().items()}
    given = [f"{config.output / role}.safetensors={used[role]:g}{ranges.get(role, '')}" for role in ROLES]
    warnings.warn(
        f"{config.output / 'merged.safetensors'} acts at all timesteps, since a file cannot carry ranges; the merge "
        f"within ranges is qrlora generate {' '.join(f'--adapter {shlex.quote(text)}' for text in given)}.",
        QrloraWarning,
        stacklevel=3,
    )


def forget_pictures(output: Path) -> None:
    """Remove our pictures of an earlier blend: those at weights no longer asked for would pass for new ones."""
    folder = output / "pictures"
    for path in (*folder.glob("merge-*.png"), *folder.glob("sweep-*.png"), output / "sweep.png"):
        if path.is_file() and has_chunk(path):
            path.unlink()


def _say(shown: bool, text: str) -> None:
    if shown:
        print(text, file=sys.stderr, flush=True)


def _load(config: BlendConfig, parts: dict[Role, Part], memory: Memory | None) -> LoadedModel:
    device, dtype = choose_place(config.device)
    if any(part.training is not None and part.training.mixed_precision == "no" for part in parts.values()):
        dtype = torch.float32
    return load_for(memory, config.model or starter.path(), dtype=dtype, device=device)


def _single(config: BlendConfig, part: Part) -> Adapter:
    """The one adapter of a role, on its blocks alone; several given ones are merged at weight 1 each."""
    adapters = [read_adapter(path) for path in part.files]
    # What is learned or chosen between a content and a style means nothing between the files of one.
    unfit = run_time_of(config) is not None or "model" in merge_options(config.method)
    method = "auto" if unfit else config.method
    adapter = adapters[0] if len(adapters) == 1 else merge(adapters, method=method)
    blocks = config.blocks(part.role)
    return adapter if blocks is None else restricted(adapter, blocks)


def _merge(
    config: BlendConfig, weights: BlendWeights, adapters: dict[Role, Adapter], model: LoadedModel
) -> tuple[Adapter | None, str]:
    """The merge at the chosen weights, and in words how it was made. That it grew is said there, not warned of.

    None with a run-time method.
    """
    if run_time_of(config) is not None:
        return None, config.method
    options: dict[str, Any] = {"model": model} if "model" in merge_options(config.method) else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merged = merge(
            [adapters[role] for role in ROLES],
            [weights.content, weights.style],
            method=config.method,
            blocks=None if adapters["content"].layers.keys() == adapters["style"].layers.keys() else [WHOLE, WHOLE],
            **options,
        )
    method = merged.header.method if merged.header is not None else config.method
    for entry in said:
        if issubclass(entry.category, NormWarning):
            warnings.warn(entry.message, entry.category, stacklevel=2)
    reasons = [str(entry.message) for entry in said if not issubclass(entry.category, NormWarning)]
    return merged, f"{method}" + "".join(f" ({reason.rstrip('.')})" for reason in reasons)


def _write_role(config: BlendConfig, part: Part, adapter: Adapter, file: Path) -> None:
    """A single file used whole is copied byte for byte, everything else written anew."""
    whole = config.blocks(part.role) is None or adapter.layers.keys() == read_adapter(part.files[0]).layers.keys()
    if len(part.files) == 1 and part.files[0].is_file() and whole:
        copy_file(part.files[0], file)
    else:
        adapter.save(file)


def _draw(
    config: BlendConfig, weights: BlendWeights, painter: Painter, parts: dict[Role, Part], prompt: str, subtitle: str
) -> Path:
    """Every picture, saved one by one, then the sheet. The merged file's is without ranges of timesteps, as it is."""
    folder, made, ranges = config.output / "pictures", list[str](), config.timesteps()
    method = run_time_of(config)
    told = {role: f"at {span(bounds)}" for role, bounds in ranges.items()}

    def paint(name: str, text: str, content: float, style: float, *, ranged: bool = True) -> Image.Image:
        used = {"content": content, "style": style}
        picture = painter.paint(text, config.seed, used, ranges if ranged else None, method=method)
        painter.save(picture, folder / f"{name}.png")
        made.append(f"pictures/{name}.png")
        return picture.image

    def cell(role: Role) -> Cell:
        text = parts[role].prompt or prompt
        alone = (1.0, 0.0) if role == "content" else (0.0, 1.0)
        return Cell(paint(role, text, *alone), f"{role} {told.get(role, 'alone')}", f'"{text}"')

    grid = Grid(
        pictures=[[paint(f"merge-{c:g}-{s:g}", prompt, c, s) for s in weights.styles] for c in weights.contents],
        row_labels=[f"{weight:g}" for weight in weights.contents],
        column_labels=[f"{weight:g}" for weight in weights.styles],
        row_title="content weight",
        column_title="style weight",
        heading=", ".join(["merge", *(f"{role} {text}" for role, text in told.items())]),
    )
    cells = [
        [Cell(parts[role].reference, f"{role} reference", parts[role].caption) for role in ROLES],
        [cell(role) for role in ROLES],
        [
            Cell(paint("base", prompt, 0.0, 0.0), "base", f'"{prompt}"'),
            Cell(
                paint("merged", prompt, weights.content, weights.style, ranged=False),
                "merged at all timesteps" if ranges else "merged" if method is None else method.name,
                f"content {weights.content:g}, style {weights.style:g}",
            ),
        ],
    ]
    sheet = draw_sheet(f'"{prompt}"', subtitle, cells, [grid])
    uses = [
        (config.output / "content.safetensors", weights.content),
        (config.output / "style.safetensors", weights.style),
    ]
    path = config.output / "blend.png"
    within = {config.output / f"{role}.safetensors": bounds for role, bounds in ranges.items()}
    chunk = painter.sheet_provenance(path, prompt, config.seed, uses, made, within, method)
    return save_picture(sheet, path, chunk)


def _subtitle(config: BlendConfig, model: LoadedModel, adapters: dict[Role, Adapter], note: str) -> str:
    kinds = list[str]()
    for role in ROLES:
        header = adapters[role].header
        rank = max(pair.rank for pair in adapters[role].layers.values())
        kinds.append(f"{(header.basis if header else None) or 'lora'}, rank {rank}")
    made = kinds[0] if len(set(kinds)) == 1 else f"content {kinds[0]}; style {kinds[1]}"
    return f"{model.model_id}   |   {made}   |   merged by {note.split(' (')[0]}   |   seed {config.seed}"
