"""Scores the embedded base as it ships: its autoencoder on held-out emoji, and 100 seen pairs from their captions.

`python -m tools.starter.score` writes benchmarks/results/starter.json, .md and .png
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qrlora import starter
from qrlora.adapter import base_hash, target_layers
from qrlora.models import LoadedModel, load_pipeline
from tools.emoji.dataset import Emoji
from tools.emoji.scores import Features, Judge, Through
from tools.starter.autoencoder import psnr, to_pixels
from tools.starter.captions import caption
from tools.starter.pictures import training_contents

COMMAND = "python -m tools.starter.score"
PAIRS = 100


def seen_pairs(emoji: Emoji) -> list[tuple[str, str]]:
    """100 training contents, evenly spaced, the training styles in turn."""
    contents = training_contents(emoji)
    chosen = contents[:: len(contents) // PAIRS][:PAIRS]
    return [(content, emoji.train_styles[i % len(emoji.train_styles)]) for i, content in enumerate(chosen)]


def draw(model: LoadedModel, prompts: list[str], seed: int = 0, **settings: Any) -> np.ndarray:
    """uint8 pictures [N, H, W, 3], one a prompt, with the model's own settings unless given."""
    pictures = model.family.generate(
        model.pipeline,
        prompts,
        seeds=[seed + i for i in range(len(prompts))],
        batch_size=25,
        **{**model.defaults.model_dump(), **settings},
    )
    return np.stack([np.asarray(p.convert("RGB")) for p in pictures])


def reconstruction(emoji: Emoji, model: LoadedModel) -> dict[str, float]:
    """Mean PSNR in dB of the autoencoder on the dev contents, by style."""
    rows = {}
    for style in emoji.styles:
        pictures = emoji.pictures(emoji.pairs(emoji.dev_contents, [style]))
        rows[style] = round(psnr(model.pipeline.vae, to_pixels(torch.from_numpy(pictures))), 2)
    return rows


def there_and_back(model: LoadedModel) -> Through:
    """Pictures through the model's autoencoder: uint8 [N, H, W, 3] to the same, its blur in them."""

    @torch.no_grad()
    def through(pictures: np.ndarray) -> np.ndarray:
        vae, shown = model.pipeline.vae, []
        for part in torch.from_numpy(pictures).split(64):
            pixels = vae.decode(vae.encode(to_pixels(part)).latent_dist.mode()).sample.clamp(-1, 1)
            shown.append(pixels.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1))
        return torch.cat(shown).numpy()

    return through


def sheet(drawn: np.ndarray, true: np.ndarray, columns: int = 20) -> Image.Image:
    """True pictures above drawn ones, pair by pair."""
    count, size = len(drawn), drawn.shape[1]
    rows = -(-count // columns)
    canvas = np.full((rows * (2 * size + 8), columns * size, 3), 255, np.uint8)
    for i in range(count):
        top, left = i // columns * (2 * size + 8), i % columns * size
        canvas[top : top + 2 * size, left : left + size] = np.concatenate([true[i], drawn[i]])
    return Image.fromarray(canvas)


def score(emoji: Emoji, model: LoadedModel, features: Features) -> tuple[dict[str, Any], np.ndarray]:
    """The report, and the drawn pictures."""
    pairs = seen_pairs(emoji)
    contents = [content for content, _ in pairs]
    judge = Judge.make(emoji, features, emoji.train_styles, contents, through=there_and_back(model))
    drawn = draw(model, [caption(emoji.name(c), s, None) for c, s in pairs])
    said = judge.content(drawn, [s for _, s in pairs], contents)
    right = sum(one == c for one, (c, _) in zip(said, pairs, strict=True)) / len(pairs)
    styles = sum(said == s for said, (_, s) in zip(judge.style(drawn), pairs, strict=True)) / len(pairs)
    report = {
        "command": COMMAND,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "base": base_hash(model.denoiser, target_layers(model.denoiser, "auto")),
        "settings": model.defaults.model_dump(),
        "psnr_db_on_dev_contents": reconstruction(emoji, model),
        "pairs": len(pairs),
        "right_content": right,
        "right_style": styles,
        "style_classifier_on_true_pictures": round(judge.accuracy, 4),
        "style_classifier_on_reconstructions": round(judge.accuracy_shown or 0.0, 4),
    }
    return report, drawn


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    psnrs: dict[str, float] = report["psnr_db_on_dev_contents"]
    rows = [
        (
            f"autoencoder PSNR, dev contents, mean of {len(psnrs)} styles",
            f"{np.mean(list(psnrs.values())):.1f} dB",
            "30 dB",
        )
    ]
    rows.append((f"nearest to the right one of {report['pairs']} contents", f"{report['right_content']:.2f}", ".8"))
    rows.append(("classified as the right style", f"{report['right_style']:.2f}", ".9"))
    for what in ("true pictures", "reconstructions"):
        share = report[f"style_classifier_on_{what.replace(' ', '_')}"]
        rows.append((f"the style classifier on {what}, all styles of these contents", f"{share:.2f}", ""))
    lines = ["# The embedded base", "", f"`{report['command']}`; torch {report['torch']}, {report['machine']}."]
    lines += [f"Base {report['base']}.", "", "| score | value | aim |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        "| style | PSNR, dB |",
        "|---|---|",
        *(f"| {style} | {value:.1f} |" for style, value in psnrs.items()),
    ]
    lines += ["", "![true above, drawn below](starter.png)", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/emoji.npz"))
    parser.add_argument("--model", type=Path, default=None, help="a pipeline folder; the embedded base if none")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/starter"))
    args = parser.parse_args()
    emoji = Emoji.load(args.data)
    model = load_pipeline(args.model or starter.path())
    report, drawn = score(emoji, model, Features())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(table(report), encoding="utf-8")
    sheet(drawn, emoji.pictures(seen_pairs(emoji))).save(args.output.with_suffix(".png"), optimize=True)
    print(table(report))


if __name__ == "__main__":
    main()
