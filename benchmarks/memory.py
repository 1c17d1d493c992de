"""`python -m benchmarks.memory`: adapted layers and estimated memory of every full-size model, into benchmarks/results.

Nothing is loaded and nothing is measured: layers are counted on the meta device, memory comes from `qrlora estimate`.
With names of models, those alone are computed and put beside what is there.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch

from qrlora.adapter import AdapterSpec, add_blank_adapter
from qrlora.models import Blueprint, read_blueprint, shipped_models
from qrlora.training import TrainConfig, estimate
from qrlora.training.config import Memory
from qrlora.training.memory import MEMORY_FIELDS, parameters_of, preset

RESULTS = Path(__file__).parent / "results"
RESOLUTIONS = (512, 1024)
RANK = 64
GIB = 2**30


def layers_of(blueprint: Blueprint) -> dict[str, Any]:
    """Adapted layers and trained numbers with and without the mask."""
    row: dict[str, Any] = {"parameters": parameters_of(blueprint.denoiser)}
    for mask in ("full", "upper"):
        trained = add_blank_adapter(blueprint.denoiser, AdapterSpec(rank=RANK, mask=mask), "counted")
        row |= {"layers": len(trained), mask: sum(trained.values())}
    row["lora"] = sum(add_blank_adapter(blueprint.denoiser, AdapterSpec(rank=RANK, basis="lora"), "counted").values())
    return row


def memory_of(blueprint: Blueprint, model: str, resolution: int) -> list[dict[str, Any]]:
    """One row a `memory` setting; equal settings are computed once."""
    rows: list[dict[str, Any]] = []
    for memory in get_args(Memory):
        settings = preset(memory, blueprint.denoiser)
        known = next((row for row in rows if row["settings"] == settings), None)
        if known is None:
            config = TrainConfig.parse(
                {"instance_data_dir": "pictures", "output_dir": "out", "resolution": resolution, "adapter.rank": RANK}
                | settings
            )
            found = estimate(config, blueprint)
            known = {
                "settings": settings,
                "phases": {phase.name: phase.parts for phase in found.phases},
                "context": found.context,
                "peak": found.peak,
                "host": found.host,
            }
            print(model, resolution, memory, f"{found.peak / GIB:.2f} GiB", flush=True)
        rows.append(known | {"memory": memory})
    return rows


def table(results: dict[str, Any]) -> str:
    """Markdown of everything."""
    lines = [
        "# Layers and memory of the full-size models",
        "",
        (
            f"`python -m benchmarks.memory`, rank {RANK}, torch {results['versions']['torch']}, diffusers "
            f"{results['versions']['diffusers']}. Layers and numbers are counted on the meta device. **Memory is an "
            "estimate** (`qrlora estimate`), not a measurement."
        ),
        "",
        "## Adapted layers",
        "",
        "| model | denoiser | layers | trained, full | trained, upper | plain LoRA |",
        "|---|---|---|---|---|---|",
    ]
    for model, row in results["layers"].items():
        lines.append(
            f"| {model} | {row['parameters'] / 1e9:.2f} B | {row['layers']} | {row['full'] / 1e6:.2f} M "
            f"| {row['upper'] / 1e6:.2f} M | {row['lora'] / 1e6:.2f} M |"
        )
    for resolution in RESOLUTIONS:
        lines += [
            "",
            f"## `memory:` at {resolution} px, batch 1",
            "",
            (
                "GiB: the two phases, and the larger with about 0.6 for the CUDA context; CPU is what streamed blocks "
                "take of the CPU's memory."
            ),
            "",
            "| model | memory | settings | encoding | training | in all | CPU |",
            "|---|---|---|---|---|---|---|",
        ]
        for model, rows in results["memory"][str(resolution)].items():
            for row in rows:
                phases = [sum(parts.values()) / GIB for parts in row["phases"].values()]
                lines.append(
                    f"| {model} | {row['memory']} | {words(row['settings'])} | {phases[0]:.2f} | {phases[1]:.2f} "
                    f"| **{row['peak'] / GIB:.2f}** | {row['host'] / GIB:.2f} |"
                )
    return "\n".join(lines) + "\n"


def words(settings: dict[str, Any]) -> str:
    """Settings that are not at their defaults, in short."""
    known = {name: settings.get(name) for name in MEMORY_FIELDS}
    parts = [known["quantization"] or "bf16"]
    parts += ["checkpointing"] if known["gradient_checkpointing"] else []
    parts += ["blocks streamed"] if known["offload"] == "blocks" else []
    parts += ["encoders streamed"] if known["encoder_offload"] == "blocks" else []
    return ", ".join(parts)


def main() -> None:
    """Compute all, or the models that are named, and write both files."""
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or shipped_models()
    results: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
        "rank": RANK,
        "layers": {},
        "memory": {str(resolution): {} for resolution in RESOLUTIONS},
    }
    if sys.argv[1:]:
        before = json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))
        assert before["versions"] == results["versions"], "computed with other versions: compute all"
        results = before
    for model in wanted:
        blueprint = read_blueprint(model)
        rows = {str(resolution): memory_of(blueprint, model, resolution) for resolution in RESOLUTIONS}
        results["layers"] = _sorted(results["layers"] | {model: layers_of(blueprint)})
        results["memory"] = {key: _sorted(results["memory"][key] | {model: found}) for key, found in rows.items()}
        if sys.argv[1:] or model == wanted[-1]:  # never a table of some models where all were asked for
            (RESULTS / "memory.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (RESULTS / "memory.md").write_text(table(results), encoding="utf-8")


def _sorted(rows: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(rows.items()))


if __name__ == "__main__":
    main()
