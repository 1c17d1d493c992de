"""When to stop: intermediate checkpoints against weights, on one sheet.

With one picture, training is mostly a question of when to stop, and an adapter trained too long can often be rescued by
a smaller weight; so both are laid out together.
"""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from qrlora.blend.checks import run_time_of
from qrlora.blend.config import BlendConfig
from qrlora.blend.painter import Painter
from qrlora.blend.provenance import save_picture
from qrlora.blend.roles import ROLES, Part, Role
from qrlora.blend.sheet import Grid, draw_sheet
from qrlora.training import checkpoint_folders, open_checkpoint


def draw_sweep(
    config: BlendConfig, painter: Painter, parts: Mapping[Role, Part], files: Mapping[Role, Path], prompt: str
) -> Path:
    """Write `sweep.png`: a grid for each trained adapter alone and one for the merge, checkpoints down, weights across.

    An adapter that was given, not trained, takes part in the merge as it is.

    The last row is the end of the training.
    """
    trained: list[Role] = [role for role in ROLES if parts[role].data is not None]
    stages = _stages(config, parts, trained, files)
    columns: dict[str, list[list[Image.Image]]] = {name: [] for name in (*trained, "merge")}
    made: list[str] = []
    for stage, adapters in stages.items():
        for role in ROLES:
            painter.attach(role, adapters[role])
        try:
            for name, rows in columns.items():
                rows.append(
                    [_paint(config, painter, parts, prompt, name, stage, w, made) for w in config.sweep_weights]
                )
        finally:
            for role in ROLES:
                painter.detach(role)
    headings = {name: parts[name].prompt or prompt for name in trained} | {"merge": prompt}
    grids = [
        Grid(
            pictures=rows,
            row_labels=list(stages),
            column_labels=[f"{weight:g}" for weight in config.sweep_weights],
            row_title="steps",
            column_title="weight" if name != "merge" else "weight of both",
            heading=f'{name}: "{headings[name]}"',
        )
        for name, rows in columns.items()
    ]
    sheet = draw_sheet("When to stop: checkpoints against weights", f"seed {config.seed}", [], grids)
    path = config.output / "sweep.png"
    used = dict.fromkeys(file for adapters in stages.values() for file in adapters.values())
    # at weight 1, which each column multiplies
    ranges = config.timesteps()
    within = {adapters[role]: ranges[role] for adapters in stages.values() for role in ROLES if role in ranges}
    uses, method = [(file, 1.0) for file in used], run_time_of(config)
    chunk = painter.sheet_provenance(path, prompt, config.seed, uses, made, within, method)
    return save_picture(sheet, path, chunk)


def _paint(
    config: BlendConfig,
    painter: Painter,
    parts: Mapping[Role, Part],
    prompt: str,
    name: str,
    stage: str,
    weight: float,
    made: list[str],
) -> Image.Image:
    alone = {role: parts[role].prompt or prompt for role in ROLES}
    text = prompt if name == "merge" else alone["content" if name == "content" else "style"]
    weights = {role: weight if name in (role, "merge") else 0.0 for role in ROLES}
    picture = painter.paint(text, config.seed, weights, config.timesteps(), method=run_time_of(config))
    made.append(f"pictures/sweep-{name}-{stage}-{weight:g}.png")
    painter.save(picture, config.output / made[-1])
    return picture.image


def _stages(
    config: BlendConfig, parts: Mapping[Role, Part], trained: list[Role], files: Mapping[Role, Path]
) -> dict[str, dict[Role, Path]]:
    """Adapter files by stage: the multiples of `sweep_steps`, a role that has ended by then as it ended; the end."""
    found: dict[Role, dict[int, Path]] = {}
    for role in trained:
        opened = [open_checkpoint(folder) for folder in checkpoint_folders(config.output / "train" / role)]
        found[role] = {checkpoint.step: checkpoint.adapter for checkpoint in opened}
    every = config.sweep_steps or 1
    stages: dict[str, dict[Role, Path]] = {}
    for step in range(every, max(parts[role].steps for role in trained), every):
        running: list[Role] = [role for role in trained if step < parts[role].steps]
        if all(step in found[role] for role in running):
            stages[str(step)] = {role: found[role][step] if role in running else files[role] for role in ROLES}
    return {**stages, "end": dict(files)}
