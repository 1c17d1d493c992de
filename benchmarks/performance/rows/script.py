"""Training as a whole process, beside diffusers' own public script."""

import hashlib
import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import yaml

from benchmarks.loss_curve import SCRIPT as RECORD
from benchmarks.loss_curve import own_config
from benchmarks.performance._measure import interleaved, process_seconds
from benchmarks.performance._row import Found, Goal, NotHere, Row
from qrlora import starter

VARIABLE, PACKAGES = "DREAMBOOTH_SCRIPT", "DREAMBOOTH_PACKAGES"
THEIRS, CACHING, OURS_LORA, OURS_QR = "the script", "the script, --cache_latents", "qrlora, plain LoRA", "qrlora, QR"
STARTING, SHORT = ", start", 2
# Settings of the record that are options of the script; the others are its defaults, or flags that are off.
FLAGS = ("center_crop",)
LEFT_OUT = ("random_flip", "gradient_accumulation_steps", "use_8bit_adam", "gradient_checkpointing", "optimizer")


def _own_command(basis: str, settings: dict[str, object], folder: Path) -> list[str]:
    """`qrlora train` with the settings, from a file of its own."""
    name = f"{basis}-{settings['max_train_steps']}"
    values = own_config(settings, 0, folder / name).model_dump(mode="json", exclude_unset=True)
    values["adapter"]["basis"] = basis
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return ["-m", "qrlora", "train", str(file)]


def _script_command(path: str, settings: dict[str, object], data: Path, output: Path, *more: str) -> list[str]:
    told: list[str] = []
    for key, value in settings.items():
        if key in FLAGS:
            told.append(f"--{key}")
        elif key not in LEFT_OUT:
            told += [f"--{key}", str(value)]
    fixed = {
        "pretrained_model_name_or_path": starter.path(),
        "instance_data_dir": data,
        "output_dir": output,
        "seed": 0,
        "checkpointing_steps": 10**6,
    }
    told += [word for key, value in fixed.items() for word in (f"--{key}", str(value))]
    return ["-m", "benchmarks.performance._diffusers_script", path, *told, *more]


def measure(quick: bool) -> Found:
    """From the start of the process to the written adapter, with the settings of the recorded loss curve."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    path = os.environ.get(VARIABLE)
    if path is None:
        raise NotHere(
            f"the script is not in this repository; set {VARIABLE} to a copy of {record['script']['repository']}, "
            f"{record['script']['path']}, and {PACKAGES} to a folder with torchvision where it is not installed"
        )
    settings = record["settings"] | ({"max_train_steps": 3, "train_batch_size": 2} if quick else {})
    steps = settings["max_train_steps"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "data").mkdir()
        shutil.copy(starter.samples().content, folder / "data")
        common = {"ACCELERATE_USE_CPU": "true", "QRLORA_CACHE": str(folder / "cache")}
        needed = {"PYTHONPATH": os.environ.get(PACKAGES) or os.environ.get("PYTHONPATH", "")}
        short = settings | {"max_train_steps": SHORT}
        commands: dict[str, list[str]] = {
            THEIRS: _script_command(path, settings, folder / "data", folder / "theirs"),
            CACHING: _script_command(path, settings, folder / "data", folder / "theirs", "--cache_latents"),
            OURS_LORA: _own_command("lora", settings, folder),
            OURS_QR: _own_command("qr", settings, folder),
            THEIRS + STARTING: _script_command(path, short, folder / "data", folder / "theirs"),
            OURS_QR + STARTING: _own_command("qr", short, folder),
        }
        calls = {
            name: partial(process_seconds, command, environment=common | ({} if name.startswith("qrlora") else needed))
            for name, command in commands.items()
        }
        times = interleaved(calls, 1 if quick else 3, warmup=0)
    rates = {name: steps / times.median(name) for name in (THEIRS, CACHING, OURS_LORA, OURS_QR)}
    start = {name: times.median(name + STARTING) for name in (THEIRS, OURS_QR)}
    step = {name: (times.median(name) - start[name]) / max(1, steps - SHORT) for name in start}
    factors = {name: times.ratio(THEIRS, name) for name in (OURS_QR, OURS_LORA)}
    return Found(
        f"{factors[OURS_QR]:.2f} x ({rates[OURS_QR]:.1f} steps a second; plain LoRA {factors[OURS_LORA]:.2f} x)",
        f"{THEIRS} {rates[THEIRS]:.1f} steps a second, with --cache_latents {rates[CACHING]:.1f}",
        (Goal("steps a second over the script's", factors[OURS_QR], 1.3, at_most=False),),
        _limit(start, step, f"{steps - SHORT} steps of {settings['train_batch_size']} pictures"),
        {
            "script": record["script"] | {"sha256_run": hashlib.sha256(Path(path).read_bytes()).hexdigest()},
            "settings": settings,
            "seconds": {name: [round(value, 2) for value in times.seconds[name]] for name in commands},
            "steps_a_second": {name: round(value, 2) for name, value in rates.items()},
            "step_seconds": {name: round(value, 4) for name, value in step.items()},
            "factors": factors,
        },
    )


def _limit(start: dict[str, float], step: dict[str, float], others: str) -> str:
    return (
        f"start, {SHORT} steps and end take {start[OURS_QR]:.1f} s ({THEIRS} {start[THEIRS]:.1f}), mostly imports of "
        f"the same libraries; each of the other {others} {step[OURS_QR]:.3f} s ({THEIRS} {step[THEIRS]:.3f}), mostly "
        "the model's own forward and backward pass (row `step`)"
    )


ROWS = [
    Row(
        "script",
        "training as a whole process, 300 steps",
        "diffusers' own public script",
        "at least 1.3 x its steps a second",
        measure,
    )
]
