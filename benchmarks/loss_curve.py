"""The loop's loss curve beside that of diffusers' public DreamBooth script for FLUX LoRA, on the embedded base.

The script's curves are data (`results/diffusers_dreambooth_flux.json`, which says how they were obtained); ours are
trained here, from the settings written there: plain LoRA, one picture. Two comparisons:

- step by step: the script was given our noise, noise levels and start, so its losses must be ours up to rounding;
- by noise band: both with draws of their own, three seeds each, as means over windows of 25 steps.

    python -m benchmarks.loss_curve     # about ten minutes on one core; loss_curve.json, .md and .png in results
"""

import argparse
import json
import math
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import numpy as np
import peft
import torch

from qrlora import starter
from qrlora.models import LoadedModel, load_pipeline
from qrlora.training import TrainConfig, train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
SCRIPT = RESULTS / "diffusers_dreambooth_flux.json"
WINDOW = 25
PLAIN, LIKE_OURS = "as published", "mode of the posterior, peft's own start"
GIVEN = "our draws"
SAMPLED, GAUSSIAN, SCHEDULED = "our draws, posterior sampled", "our draws, its own start", "our draws, other settings"

Curves = dict[str, Any]


def own_config(settings: dict[str, Any], seed: int, output: Path) -> TrainConfig:
    """What the script was told, under our names: most are the same; `adapter.seed` is the run's.

    The script needs `repeats` to fill a batch from one picture; ours draws from it as often as a batch asks.
    """
    shared = {key: value for key, value in settings.items() if key in TrainConfig.model_fields and key != "repeats"}
    sample = starter.samples()
    return TrainConfig.parse(
        shared
        | {
            "instance_data_dir": str(sample.content),
            "instance_prompt": settings["instance_prompt"],
            "output_dir": str(output),
            "seed": seed,
            "adapter": {
                "basis": "lora",
                "rank": settings["rank"],
                "lora_alpha": settings["lora_alpha"],
                "seed": seed,
            },
            "checkpointing_steps": 10**6,
            "overwrite": True,
        }
    )


def own_losses(model: LoadedModel, settings: dict[str, Any], seed: int) -> list[float]:
    """Ours, one a step."""
    with tempfile.TemporaryDirectory() as folder:
        return train(own_config(settings, seed, Path(folder) / "run"), loaded=model, progress=False).losses


def relative(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    """`|ours - theirs| / theirs`, a step each."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return np.abs(a - b) / np.abs(b)


def windows(curves: Sequence[Sequence[float]]) -> np.ndarray:
    """`[seeds, steps]` to means over windows of `WINDOW` steps, `[seeds, steps // WINDOW]`."""
    values = np.asarray(curves, dtype=np.float64)
    return values[:, : values.shape[1] // WINDOW * WINDOW].reshape(len(values), -1, WINDOW).mean(axis=2)


def noise(curves: Sequence[Sequence[float]]) -> np.ndarray:
    """Variance of one step's loss between seeds, `[steps // WINDOW]`.

    Steps draw their noise and levels apart, so a mean over k steps of n seeds has this variance over k n; averaging
    over a window makes it a number that few seeds give well.
    """
    values = np.asarray(curves, dtype=np.float64)
    return windows([values.var(axis=0, ddof=1).tolist()])[0]


def compare(own: list[list[float]], theirs: list[list[float]]) -> dict[str, Any]:
    """Two sets of seeds, in units of the standard error of their difference: the whole run, and each window."""
    gap = windows(own).mean(axis=0) - windows(theirs).mean(axis=0)
    variance = (noise(own) / len(own) + noise(theirs) / len(theirs)) / WINDOW
    error = float(np.sqrt(variance.mean() / len(gap)))
    return {
        "mean_difference": float(f"{gap.mean():.3g}"),
        "standard_error": float(f"{error:.3g}"),
        "whole_run": round(float(gap.mean()) / error, 2),
        "windows": [round(float(z), 2) for z in gap / np.sqrt(variance)],
    }


def report_of(script: dict[str, Any], own: dict[int, list[float]], scheduled: list[float]) -> dict[str, Any]:
    """Everything that the page says."""
    runs = script["runs"]
    seed = int(next(iter(runs[GIVEN]["loss"])))
    exact = {name: runs[name]["loss"][str(seed)] for name in (GIVEN, SAMPLED, GAUSSIAN)}
    mine = list(own.values())
    others = {name: list(runs[name]["loss"].values()) for name in (PLAIN, LIKE_OURS)}
    effects = {name: np.asarray(exact[name]) - np.asarray(exact[GIVEN]) for name in (SAMPLED, GAUSSIAN)}
    explained = [list(np.asarray(curve) + effects[SAMPLED] + effects[GAUSSIAN]) for curve in mine]
    return {
        "command": "python -m benchmarks.loss_curve",
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "peft": peft.__version__,
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "script": script["script"],
        "settings": script["settings"],
        "step_by_step": {
            "seed": seed,
            "steps": len(exact[GIVEN]),
            "largest_relative_difference": float(f"{relative(own[seed], exact[GIVEN]).max():.2g}"),
            "other_settings": runs[SCHEDULED]["note"],
            "other_steps": len(scheduled),
            "with_other_settings": float(f"{relative(scheduled, runs[SCHEDULED]['loss'][str(seed)]).max():.2g}"),
        },
        "by_noise_band": {
            "seeds": len(mine),
            "like ours": compare(mine, others[LIKE_OURS]),
            "as published": compare(mine, others[PLAIN]),
            "as published, its differences added to ours": compare(explained, others[PLAIN]),
        },
        "effects": {
            name: {
                "mean": float(f"{effect.mean():.3g}"),
                "windows": [float(f"{x:.3g}") for x in windows([effect.tolist()])[0]],
            }
            for name, effect in effects.items()
        },
        "own_losses": {str(seed): [float(f"{x:.7g}") for x in curve] for seed, curve in own.items()},
    }


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    script, exact, band, effects = (report[key] for key in ("script", "step_by_step", "by_noise_band", "effects"))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    count = len(band["like ours"]["windows"])
    against = "\n".join(
        f"| {name} | {row['mean_difference']:+.4f} ± {row['standard_error']:.4f} | {row['whole_run']:+.1f} | "
        f"{max(row['windows'], key=abs):+.1f} |"
        for name, row in (
            ("the script with the posterior's mode and peft's own start", band["like ours"]),
            ("the script as published", band["as published"]),
            ("the same, the two effects below added to ours", band["as published, its differences added to ours"]),
        )
    )
    deviation = script["posterior_deviation"]
    sizes = "\n".join(
        f"| {what} | {effects[name]['mean']:+.4f} | {effects[name]['windows'][0]:+.4f} | "
        f"{effects[name]['windows'][-1]:+.4f} |"
        for name, what in (
            (SAMPLED, "samples the autoencoder's posterior at every step; we cache its mode"),
            (GAUSSIAN, "starts lora_A from a normal distribution of deviation 1/r; ours, as peft's, is uniform"),
        )
    )
    return f"""# The loss curve beside diffusers' own

`{report["command"]}`; {versions}; {report["machine"]}.
The script is `{script["path"]}` of {script["repository"]} {script["version"]}.
How its curves were obtained, with every setting and changed line, is in
[diffusers_dreambooth_flux.json](diffusers_dreambooth_flux.json).

## Step by step

The script was given our noise, our noise levels and our start of the adapter, and takes the mode of the autoencoder's
posterior, as our cache does. All else is its own: encoding, noising, packing, loss, clipping, AdamW, learning rate.

| | steps | largest relative difference of a loss |
|---|---|---|
| constant rate | {exact["steps"]} | {exact["largest_relative_difference"]:.1e} |
| {exact["other_settings"]} | {exact["other_steps"]} | {exact["with_other_settings"]:.1e} |

## By noise band

Each with draws of its own, {band["seeds"]} seeds each: ours less it. Differences are in standard errors, from the
deviation of a step's loss between seeds. Of {count} windows of {WINDOW} steps, the largest is below 3 in 97 of 100
cases where there is no difference.

| compared with | mean loss | in standard errors | largest window |
|---|---|---|---|
{against}

![loss curves](loss_curve.png)

## What differs, and by how much

On the same draws, so without their noise: how the script's mean loss changes, in the whole run and in its first and
last {WINDOW} steps.

| the script | whole run | first | last |
|---|---|---|---|
{sizes}

Sampling costs loss where little noise is left, since the posterior's own (deviation t = {deviation:.3f}, in latents of
deviation {script["latent_deviation"]:.2f}) cannot be told from it: even for a known picture the target keeps a variance
of t^2 / (s^2 + (1 - s)^2 t^2) at level s, which is {deviation * math.pi / 2:.3f} on average over the levels.
"""


def draw_figure(script: dict[str, Any], report: dict[str, Any], path: Path) -> None:
    """Left: means and bands of the seeds; right: the losses of one run, step by step."""
    runs, own = script["runs"], list(report["own_losses"].values())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), constrained_layout=True)
    series = [
        ("diffusers' script, as published", list(runs[PLAIN]["loss"].values()), "#9a9a9a"),
        ("the script, mode and start like ours", list(runs[LIKE_OURS]["loss"].values()), "#d1702a"),
        ("qrlora", own, "#1f5fa8"),
    ]
    for name, curves, colour in series:
        means = windows(curves)
        steps = (np.arange(means.shape[1]) + 0.5) * WINDOW
        centre, spread = means.mean(axis=0), means.std(axis=0, ddof=1)
        left.fill_between(steps, centre - spread, centre + spread, color=colour, alpha=0.2, linewidth=0)
        left.plot(steps, centre, color=colour, marker="o", markersize=3.5, label=f"{name} ({len(curves)} seeds)")
    left.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", yscale="log")
    ticks = (0.05, 0.1, 0.2, 0.5, 1)
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    left.set_title("draws of their own: mean and deviation of the seeds", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    seed = str(report["step_by_step"]["seed"])
    theirs, ours = runs[GIVEN]["loss"][seed], report["own_losses"][seed]
    right.plot(theirs, color="#d1702a", linewidth=3, alpha=0.5, label="diffusers' script")
    right.plot(ours, color="#1f5fa8", linewidth=0.8, label="qrlora")
    right.set(xlabel="step", ylabel="loss", ylim=(0, None))
    largest = report["step_by_step"]["largest_relative_difference"]
    right.set_title(f"the same draws: they differ by {largest:.0e} at most", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Trains ours, compares, and writes `loss_curve.json`, `.md` and `.png`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "loss_curve")
    options = parser.parse_args()
    script = json.loads(SCRIPT.read_text(encoding="utf-8"))
    settings = script["settings"]
    model = load_pipeline(starter.path())
    own: dict[int, list[float]] = {}
    for seed in map(int, script["runs"][LIKE_OURS]["loss"]):
        own[seed] = own_losses(model, settings, seed)
        print(f"seed {seed}: mean loss {np.mean(own[seed]):.4f}", flush=True)
    seed = int(next(iter(script["runs"][SCHEDULED]["loss"])))
    scheduled = own_losses(model, settings | script["runs"][SCHEDULED]["settings"], seed)
    report = report_of(script, own, scheduled)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(page(report), encoding="utf-8")
    draw_figure(script, report, options.output.with_suffix(".png"))
    print(page(report))


if __name__ == "__main__":
    main()
