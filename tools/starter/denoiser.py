"""Trains the embedded base's denoiser and its two text encoders together, on the latents of the trained autoencoder.

`python -m tools.starter.denoiser --autoencoder data/starter/autoencoder/model --output data/starter/denoiser`
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tools.emoji.dataset import Emoji
from tools.starter.autoencoder import to_pixels
from tools.starter.captions import LENGTH, VOCABULARY, caption, dropped, save_tokenizers, train_tokenizers
from tools.starter.pictures import Pictures, drawn_contents, load_or_make, mixed
from tools.starter.run import Run, generator

WIDTH, HEAD, TEXT, POOLED = 256, 32, 192, 128
SHORT = 16


class Denoiser(nn.Module):
    """The three trained parts of the pipeline; forward is the velocity of packed latents."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=HEAD,
            num_attention_heads=WIDTH // HEAD,
            joint_attention_dim=TEXT,
            pooled_projection_dim=POOLED,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=POOLED,
                intermediate_size=2 * POOLED,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=VOCABULARY,
                d_model=TEXT,
                d_kv=32,
                d_ff=2 * TEXT,
                num_layers=2,
                num_heads=TEXT // 32,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
                use_cache=False,
            )
        )
        size = 4
        self.register_buffer("img_ids", FluxPipeline._prepare_latent_image_ids(1, size, size, "cpu", torch.float32))

    def forward(self, packed: Tensor, sigmas: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Velocity [N, 16, 64] of `packed` [N, 16, 64] at noise levels `sigmas` [N] in [0, 1]."""
        pooled = self.text_encoder(clip_ids).pooler_output
        words = self.text_encoder_2(t5_ids).last_hidden_state
        return self.transformer(
            hidden_states=packed,
            encoder_hidden_states=words,
            pooled_projections=pooled,
            timestep=sigmas,
            img_ids=self.img_ids,
            txt_ids=self.img_ids.new_zeros(t5_ids.shape[1], 3),
            return_dict=False,
        )[0]


@torch.no_grad()
def equalise(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Give every latent channel unit variance and the whole zero mean, in the weights: FLUX has one factor for all.

    Scaling the encoder's last and the decoder's first convolution leaves every reconstruction as it was.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])
    std = latents.std(dim=(0, 2, 3))
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    last.weight[: len(std)] /= std[:, None, None, None]
    last.bias[: len(std)] /= std
    last.bias[len(std) :] -= 2 * std.log()
    first.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0, shift_factor=float((latents / std[:, None, None]).mean()))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> Tensor:
    """Packed, normalised latents [N, 16, 64] of uint8 pictures [N, 64, 64, 3]."""
    packed = []
    for part in torch.from_numpy(pictures).split(128):
        latents = vae.encode(to_pixels(part)).latent_dist.mean
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        count, channels, height, width = latents.shape
        packed.append(FluxPipeline._pack_latents(latents, count, channels, height, width))
    return torch.cat(packed)


def captions_of(emoji: Emoji, data: Pictures) -> list[str]:
    """Whole captions for the tokenizers, also of contents the base does not learn: its users will name them."""
    treatments = [None, *data.treatments]
    names = [emoji.name(content) for content in drawn_contents(emoji)]
    return [caption(n, s, t) for n in names for s in data.styles for t in treatments]


def draw_captions(data: Pictures, index: Tensor, random: torch.Generator) -> list[str]:
    """The captions of a batch, with their dropouts."""
    parts = zip(data.name[index], data.style[index], data.treatment[index], strict=True)
    return [dropped(data.names[n], data.styles[s], None if t < 0 else data.treatments[t], random) for n, s, t in parts]


def draw_sigmas(count: int, random: torch.Generator) -> Tensor:
    """Noise levels [count]: logit-normal for three in four, uniform for the rest, so that both ends are learned."""
    middle = torch.sigmoid(torch.randn(count, generator=random))
    return torch.where(torch.rand(count, generator=random) < 0.25, torch.rand(count, generator=random), middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/emoji.npz"))
    parser.add_argument("--autoencoder", type=Path, default=Path("data/starter/autoencoder/model"))
    parser.add_argument("--output", type=Path, default=Path("data/starter/denoiser"))
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--treated", type=int, default=24, help="pictures of a batch that are treated")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--long", type=float, default=0.05, help=f"last part of the steps with {LENGTH} text tokens")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    emoji = Emoji.load(args.data)
    data = load_or_make(emoji, args.output.parent / "pictures.npz")
    vae = AutoencoderKL.from_pretrained(args.autoencoder)
    equalise(vae, to_pixels(torch.from_numpy(data.pictures[:: len(data.pictures) // 512])))
    latents = encode(vae, data.pictures)
    print(
        f"{len(latents)} pictures of {len(data.keys)} contents, latents {latents.mean():.3f} +- {latents.std():.3f}",
        flush=True,
    )

    clip, t5 = train_tokenizers(captions_of(emoji, data))
    model = Denoiser()
    run = Run(args.output, model, args.steps, args.learning_rate, warmup=200, decay=0.9995, save_every=500)
    forward = torch.compile(model, dynamic=False) if args.compile else model

    def step_loss(step: int) -> Tensor:
        random = generator(args.seed, step)
        index = mixed(data.treatment, args.batch, args.treated, args.seed, step)
        texts = draw_captions(data, index, random)
        length = LENGTH if step > args.steps * (1 - args.long) else SHORT
        words = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip_ids = clip(texts, max_length=LENGTH, **words).input_ids
        t5_ids = t5(texts, max_length=length, **words).input_ids
        noise = torch.randn(args.batch, 16, 64, generator=random)
        sigmas = draw_sigmas(args.batch, random)
        level = sigmas[:, None, None]
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # flash backward is slow on a CPU
            velocity = forward((1 - level) * latents[index] + level * noise, sigmas, clip_ids, t5_ids)
        return (velocity.float() - (noise - latents[index])).square().mean()

    def keep(step: int) -> None:
        averaged = Denoiser()
        averaged.load_state_dict(run.average.state)
        for part in ("transformer", "text_encoder", "text_encoder_2"):
            getattr(averaged, part).save_pretrained(args.output / "model" / part)
        vae.save_pretrained(args.output / "model" / "vae")
        save_tokenizers(args.output / "model", clip, t5)
        facts = {
            "steps": step,
            "batch": args.batch,
            "contents": len(data.keys),
            "variants": 1 + len(data.treatments),
            "treatments": len(data.treatments),
        }
        (args.output / "model" / "run.json").write_text(json.dumps(facts), encoding="utf-8")

    run.go(step_loss, keep)


if __name__ == "__main__":
    main()
