"""How often a merge of a content and a style adapter shows both: 20 dev pairs of the emoji, QR-LoRA beside plain LoRA.

For each pair: a content adapter from one picture of a held-out content in noto's style, a style adapter from one
picture of a red apple in a held-out style, both trained with the embedded base's own settings but for the learning
rate, and their exact merge asked for the content in the style. The true picture of each pair exists, so what a merge
shows is judged against those.

`python -m benchmarks.pairs --methods qr=0.004 lora=0.002` writes benchmarks/results/pairs.json, .md and .png; what was
trained is kept in data/pairs, so an interrupted run continues.
"""

import argparse
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qrlora import starter
from qrlora.adapter import attach_adapter, base_hash, remove_adapter, target_layers
from qrlora.formats import read_adapter
from qrlora.merging import merge
from qrlora.models import LoadedModel, load_pipeline
from qrlora.training import TrainConfig, train
from tools.emoji.dataset import Emoji
from tools.emoji.scores import Features, Judge
from tools.starter.score import there_and_back

CONTENT_STYLE, STYLE_CONTENT = "noto", "1f34e"
STYLES = ("fluent-3d", "openmoji", "openmoji-black", "emojione-mono", "fxemoji")
CONTENTS, STYLES_EACH = 10, 2
SEEDS = (0, 1)
PROMPT = "a <c> emoji in <s> style"


@dataclass(frozen=True)
class Method:
    """An adapter kind at a learning rate, written `qr=0.004`."""

    basis: str
    learning_rate: float

    @classmethod
    def parse(cls, text: str) -> "Method":
        basis, _, rate = text.partition("=")
        return cls(basis, float(rate))

    def __str__(self) -> str:
        return f"{self.basis} at {self.learning_rate:g}"


def dev_pairs(emoji: Emoji) -> list[tuple[str, str]]:
    """20 pairs: dev contents that noto and all held-out styles draw, signs left out, each in two styles in turn."""
    drawn = [
        content
        for content in emoji.dev_contents
        if emoji.category(content) != "symbols" and all((content, s) in emoji for s in (CONTENT_STYLE, *STYLES))
    ]
    chosen = drawn[:: len(drawn) // CONTENTS][:CONTENTS]
    return [(c, STYLES[(STYLES_EACH * i + j) % len(STYLES)]) for i, c in enumerate(chosen) for j in range(STYLES_EACH)]


def trained(
    model: LoadedModel,
    emoji: Emoji,
    pair: tuple[str, str],
    prompt: str,
    method: Method,
    folder: Path,
    steps: int,
) -> Path:
    """The adapter of one picture, trained unless it lies in `folder` already."""
    output = folder / f"{method.basis}-{method.learning_rate:g}-{steps}" / "-".join(pair)
    result = output / "adapter.safetensors"
    if result.exists():
        return result
    picture = folder / "pictures" / f"{'-'.join(pair)}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(emoji[pair]).save(picture)
    values: dict[str, Any] = {
        "instance_data_dir": str(picture),
        "instance_prompt": prompt,
        "output_dir": str(output),
        "learning_rate": method.learning_rate,
        "adapter.basis": method.basis,
        "max_train_steps": steps,
        "resume": "latest" if any(output.glob("checkpoint-*")) else None,
    }
    return train(TrainConfig.parse(values), loaded=model, progress=False).path


def generate(model: LoadedModel, prompt: str) -> np.ndarray:
    """uint8 [seeds, H, W, 3]."""
    pictures = model.family.generate(
        model.pipeline, [prompt] * len(SEEDS), seeds=list(SEEDS), batch_size=len(SEEDS), **model.defaults.model_dump()
    )
    return np.stack([np.asarray(p.convert("RGB")) for p in pictures])


def merged_pictures(model: LoadedModel, content: Path, style: Path, weights: tuple[float, float]) -> np.ndarray:
    """Pictures of the merge, made as an adapter of its own; the method is `sum` on one basis, else `concat`."""
    adapters = [read_adapter(content), read_adapter(style)]
    headers = [a.header for a in adapters]
    basis = headers[0].basis if headers[0] is not None else None
    merged = merge(adapters, list(weights), method="sum" if basis not in (None, "lora") else "concat")
    attach_adapter(model.denoiser, merged, "merged")
    pictures = generate(model, PROMPT)
    remove_adapter(model.denoiser, "merged")
    return pictures


def measure(
    judge: Judge, pictures: np.ndarray, pairs: list[tuple[str, str]], gallery: tuple[str, ...]
) -> dict[str, float]:
    """Shares nearest to the right content, in the right style, and both; `pictures` [pairs * seeds, H, W, 3]."""
    wanted = [pair for pair in pairs for _ in SEEDS]
    contents = judge.content(pictures, [s for _, s in wanted], gallery)
    content = [said == c for said, (c, _) in zip(contents, wanted, strict=True)]
    style = [said == s for said, (_, s) in zip(judge.style(pictures), wanted, strict=True)]
    both = [a and b for a, b in zip(content, style, strict=True)]
    return {name: sum(hits) / len(hits) for name, hits in (("content", content), ("style", style), ("both", both))}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Content and style in one picture: 20 dev pairs", "", f"`{report['command']}`", ""]
    lines += [f"torch {report['torch']}, {report['machine']}; base {report['base']}. {report['note']}", ""]
    lines += ["| | right content | right style | both |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {r['content']:.3f} | {r['style']:.3f} | {r['both']:.3f} |" for name, r in report["rows"].items()
    ]
    lines += [
        "",
        "Each row of the picture: the content picture, the style picture, the true answer, then each method's merge.",
        "",
    ]
    return "\n".join([*lines, "![pairs](pairs.png)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/emoji.npz"))
    parser.add_argument("--work", type=Path, default=Path("data/pairs"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/pairs"))
    parser.add_argument("--methods", nargs="+", default=["qr=0.004", "lora=0.002"])
    parser.add_argument("--steps", type=int, default=None, help="of each adapter; the embedded base's own if none")
    parser.add_argument("--weights", nargs=2, type=float, default=(1.0, 1.0))
    parser.add_argument("--train-only", action="store_true")
    args = parser.parse_args()

    emoji, model = Emoji.load(args.data), load_pipeline(starter.path())
    pairs = dev_pairs(emoji)
    base = base_hash(model.denoiser, target_layers(model.denoiser, "auto"))
    work = args.work / base[:12]  # what was trained on another base must not be taken for this one's
    steps = {
        role: args.steps or {**model.training, **model.roles.get(role, {})}["max_train_steps"]
        for role in ("content", "style")
    }
    methods = [Method.parse(text) for text in args.methods]
    columns: dict[str, np.ndarray] = {"no adapter": np.concatenate([generate(model, PROMPT)] * len(pairs))}
    for method in methods:
        made = []
        for i, (content, style) in enumerate(pairs):
            content_file = trained(
                model,
                emoji,
                (content, CONTENT_STYLE),
                f"a <c> emoji in {CONTENT_STYLE} style",
                method,
                work,
                steps["content"],
            )
            style_prompt = f"a {emoji.name(STYLE_CONTENT)} emoji in <s> style"
            style_file = trained(model, emoji, (STYLE_CONTENT, style), style_prompt, method, work, steps["style"])
            print(f"{method}: pair {i + 1} of {len(pairs)}", flush=True)
            if not args.train_only:
                made.append(merged_pictures(model, content_file, style_file, tuple(args.weights)))
        if made:
            columns[str(method)] = np.concatenate(made)
    if args.train_only:
        return
    judge = Judge.make(emoji, Features(), emoji.styles, emoji.dev_contents, through=there_and_back(model))
    truth = np.concatenate([emoji.pictures([pair] * len(SEEDS)) for pair in pairs])
    rows = {
        name: measure(judge, p, pairs, emoji.dev_contents)
        for name, p in (columns | {"the true pictures": truth}).items()
    }
    report = {
        "command": "python -m benchmarks.pairs --methods "
        + " ".join(args.methods)
        + (f" --steps {args.steps}" if args.steps else ""),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "base": base,
        "weights": list(args.weights),
        "seeds": list(SEEDS),
        "pairs": pairs,
        "rows": rows,
        "note": f"Rank {model.training['rank']}, {steps['content']} steps a content and {steps['style']} a style; "
        f"merged at {tuple(args.weights)}, "
        f"{len(SEEDS)} seeds a pair; content among {len(emoji.dev_contents)} dev contents, style among "
        f"{len(emoji.styles)}; the classifier is right on {judge.accuracy:.3f} of true held-out pictures, "
        f"{judge.accuracy_shown:.3f} as the base's autoencoder shows them.",
    }
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(table(report), encoding="utf-8")
    step = len(SEEDS)
    lines = [
        np.concatenate(
            [
                emoji[c, CONTENT_STYLE],
                emoji[STYLE_CONTENT, s],
                emoji[c, s],
                *(p[step * i] for n, p in columns.items() if n != "no adapter"),
            ],
            axis=1,
        )
        for i, (c, s) in enumerate(pairs)
    ]
    half = len(lines) // 2
    Image.fromarray(np.concatenate([np.concatenate(lines[:half]), np.concatenate(lines[half:])], axis=1)).save(
        args.output.with_suffix(".png"), optimize=True
    )
    print(table(report))


if __name__ == "__main__":
    main()
