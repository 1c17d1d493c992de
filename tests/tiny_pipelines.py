"""Tiny pipelines of the true classes, built with no network and saved as ordinary diffusers folders."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789<>.,'-"
HIDDEN = 32
GENERATION = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "true_cfg_scale": 2.0,
    "negative_prompt": "",
    "max_sequence_length": 16,
}


def clip_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={token: row for row, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, *("▁" + letter for letter in LETTERS)]
    return T5TokenizerFast(vocab=[(piece, -float(row)) for row, piece in enumerate(pieces)], extra_ids=0)


def flux_transformer(seed: int = 0, *, guidance_embeds: bool = False) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    ).eval()


def flux_pipeline(seed: int = 0, *, guidance_embeds: bool = False) -> FluxPipeline:
    """A FluxPipeline of about 0.4 MB: 8x autoencoder with 4 latent channels, pictures of 32 x 32, 4 tokens."""
    transformer = flux_transformer(seed, guidance_embeds=guidance_embeds)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer_2), d_model=HIDDEN, d_ff=HIDDEN, d_kv=16, num_layers=1, num_heads=2)
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        scaling_factor=0.8,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, clip, tokenizer, t5, tokenizer_2, transformer)


def save_flux(folder: Path, seed: int = 0, *, guidance_embeds: bool = False) -> Path:
    """Save the tiny pipeline with a `qrlora.json` that makes generating quick."""
    flux_pipeline(seed, guidance_embeds=guidance_embeds).save_pretrained(folder)
    settings = {"name": "tiny-flux", "generation": GENERATION, "training": {"resolution": 32, "rank": 4}}
    (folder / "qrlora.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
