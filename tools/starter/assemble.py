"""Puts the trained parts into the folder that ships: a `FluxPipeline`, its settings, its model card, and the samples.

`python -m tools.starter.assemble --trained data/starter/denoiser/model --output src/qrlora/starter`
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel

from qrlora import starter
from tools.emoji.dataset import Emoji

SETTINGS = "qrlora.json"
SAMPLES = {"dragon-noto.png": ("1f409", "noto"), "red-apple-fluent-3d.png": ("1f34e", "fluent-3d")}
CARD = """---
license: other
pipeline_tag: text-to-image
library_name: diffusers
---
# The embedded base of qrlora

A FLUX pipeline small enough to ship: it draws {size} x {size} emoji in the styles {styles},
and in {treatments} procedural treatments of them. It exists so that the first command works offline and every test runs
on the real classes; it knows nothing else.

Trained by `make starter` (`tools/starter`) on {contents} contents x {style_count} styles x {variants} variants,
{steps} steps of {batch} pictures; the one that ships took the first 4,500 of them on 675 contents
(`docs/starter.md` tells how). Held out from it: 240 contents, the styles {held_out},
and the treatments that `tools/emoji/treatments.py` marks so.
Scores: `benchmarks/results/starter.md`. Ask for "a red apple emoji in noto style", or "... as a line drawing".

## Attribution
The training pictures were rendered from these packages; a small model remembers, so their licences are kept in mind.

{attributions}

The two sample pictures: `dragon-noto.png` is Noto Emoji's dragon (Apache-2.0, Google), `red-apple-fluent-3d.png` is
Fluent Emoji's red apple (MIT, Microsoft), both resized.
"""


def pipeline_of(trained: Path) -> FluxPipeline:
    """The parts as `tools.starter.denoiser` left them; the denoiser alone, the largest, is stored in fp16."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(trained / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(trained / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(trained / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(trained / "text_encoder_2"),
        tokenizer_2=AutoTokenizer.from_pretrained(trained / "tokenizer_2"),
        transformer=FluxTransformer2DModel.from_pretrained(trained / "transformer").to(torch.float16),
    )


def card(emoji: Emoji, run: dict[str, int]) -> str:
    """The model card, with an attribution a style."""
    lines = [f"- {s['name']}: {s['source']}, {s['licence']}" for s in emoji.meta["styles"] if s["role"] == "train"]
    return CARD.format(
        size=emoji.size,
        styles=", ".join(emoji.train_styles),
        held_out=", ".join(emoji.held_out_styles),
        style_count=len(emoji.train_styles),
        attributions="\n".join(lines),
        **run,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/emoji.npz"))
    parser.add_argument("--trained", type=Path, default=Path("data/starter/denoiser/model"))
    parser.add_argument("--output", type=Path, default=Path("src/qrlora/starter"))
    args = parser.parse_args()
    model, pipeline = args.output / "model", pipeline_of(args.trained)
    # How to train and draw on it was found by benchmarks and is written by hand: it outlives the weights.
    settings = (starter.path() / SETTINGS).read_text(encoding="utf-8")
    shutil.rmtree(model, ignore_errors=True)
    pipeline.save_pretrained(model)
    (model / SETTINGS).write_text(settings, encoding="utf-8")
    emoji = Emoji.load(args.data)
    run = json.loads((args.trained / "run.json").read_text(encoding="utf-8"))
    (model / "README.md").write_text(card(emoji, run), encoding="utf-8")
    samples = args.output / "samples"
    samples.mkdir(exist_ok=True)
    for name, pair in SAMPLES.items():
        Image.fromarray(emoji[pair]).save(samples / name, optimize=True)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
