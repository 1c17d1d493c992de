"""Trains the embedded base's `AutoencoderKL`: 8x down, 16 latent channels, on plain and treated emoji.

`python -m tools.starter.autoencoder --data data/emoji.npz --output data/starter/autoencoder`
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from tools.emoji.dataset import Emoji
from tools.starter.pictures import load_or_make, mixed
from tools.starter.run import Run, generator

CONFIG = {
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
    "sample_size": 64,
}


def augment(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Mirror, permute the colours and shift by up to 4 pixels (border repeated): held-out styles have other colours."""
    count = len(pixels)
    mirrored = torch.rand(count, generator=random) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    order = torch.stack([torch.randperm(3, generator=random) for _ in range(count)])
    keep = torch.rand(count, generator=random) < 0.6
    order[keep] = torch.arange(3)
    pixels = pixels.gather(1, order[:, :, None, None].expand_as(pixels))
    dy, dx = torch.randint(0, 9, (2,), generator=random).tolist()
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (4, 4, 4, 4), mode="replicate")[..., dy : dy + height, dx : dx + width]


def reconstruction_loss(got: Tensor, wanted: Tensor) -> Tensor:
    """L1 + 2 MSE + L1 of the picture's gradients, on [N, 3, H, W] in [-1, 1]."""
    error = got - wanted
    horizontal, vertical = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + horizontal + vertical


def psnr(model: AutoencoderKL, pixels: Tensor, batch: int = 64) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; `pixels` [N, 3, H, W] in [-1, 1]."""
    errors = []
    with torch.no_grad():
        for part in pixels.split(batch):
            got = model.decode(model.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
            errors.append((got - part).square().mean(dim=(1, 2, 3)))
    return (10 * torch.log10(4 / torch.cat(errors).clamp_min(1e-8))).mean().item()


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def held_out(emoji: Emoji, count: int = 256) -> Tensor:
    """Pictures of dev contents in every style, the base has seen none of them: [count, 3, H, W] in [-1, 1]."""
    pairs = emoji.pairs(emoji.dev_contents)
    return to_pixels(torch.from_numpy(emoji.pictures(pairs[:: max(1, len(pairs) // count)][:count])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/emoji.npz"))
    parser.add_argument("--output", type=Path, default=Path("data/starter/autoencoder"))
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--kl", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    emoji = Emoji.load(args.data)
    data = load_or_make(emoji, args.output.parent / "pictures.npz")
    pictures = torch.from_numpy(data.pictures)
    model = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    nn.init.constant_(
        model.encoder.conv_out.bias[16:], -8.0
    )  # at its usual start, noise of unit variance drowns the latents
    run = Run(args.output, model, args.steps, args.learning_rate)
    test = held_out(emoji)

    def loss_of(pixels: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(pixels).latent_dist
            got = model.decode(posterior.mean + posterior.std * noise).sample.float()
        return reconstruction_loss(got, pixels) + args.kl * posterior.kl().mean()

    def step_loss(step: int) -> Tensor:
        random = generator(args.seed, step)
        pixels = to_pixels(pictures[mixed(data.treatment, args.batch, args.batch // 3, args.seed, step)])
        pixels = augment(pixels, random).to(memory_format=torch.channels_last)
        return loss_of(pixels, torch.randn(args.batch, 16, 8, 8, generator=random))

    def evaluate(step: int) -> None:
        averaged = AutoencoderKL(**CONFIG)
        averaged.load_state_dict(run.average.state)
        averaged.save_pretrained(args.output / "model")
        print(f"step {step}  held-out PSNR {psnr(averaged, test):.2f} dB", flush=True)

    run.go(step_loss, evaluate)


if __name__ == "__main__":
    main()
