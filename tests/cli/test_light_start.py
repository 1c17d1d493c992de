"""What a verb's help loads: nothing that takes a second to import."""

import json
import os
import subprocess
import sys
from pathlib import Path

from qrlora import cli

HEAVY = {
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "matplotlib",
    "PIL",
    "huggingface_hub",
}


LIGHT = ("blend", "merge", "analyze", "generate", "export", "inspect", "basis")
"""Verbs whose options are classes of their own; train, estimate and config describe the training's configuration."""


def loaded(*lines: str) -> set[str]:
    """Top-level packages in memory after these command lines, in a process of its own."""
    code = (
        "import contextlib, json, sys\nfrom qrlora.cli import main\n"
        f"for line in {lines!r}:\n    with contextlib.suppress(SystemExit):\n        main(line.split())\n"
        "print('LOADED', json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
        check=True,
    )
    return set(json.loads(done.stdout.rpartition("LOADED ")[2]))


def test_the_usage_loads_the_standard_library_alone() -> None:
    assert not loaded("--help", "--version", "blnd") & (HEAVY | {"pydantic", "tyro", "yaml", "rich"})


def test_a_verb_s_help_and_a_mistyped_option_load_its_options_alone() -> None:
    assert not loaded(*(f"{verb} --help" for verb in LIGHT), "blend --contnt x", "merge a.safetensors") & HEAVY
