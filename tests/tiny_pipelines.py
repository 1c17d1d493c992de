"""Tiny pipelines of the true classes, built with no network and saved as ordinary diffusers folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

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
SD3_GENERATION = {**GENERATION, "guidance_scale": 2.0, "true_cfg_scale": 1.0}
SDXL_GENERATION = {**SD3_GENERATION, "max_sequence_length": 77}


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
    clip = CLIPTextModel(clip_config(tokenizer)).eval()
    t5 = _t5(tokenizer_2)
    vae = autoencoder(scaling_factor=0.8, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, clip, tokenizer, t5, tokenizer_2, transformer)


def sd3_transformer(seed: int = 0, *, dual_attention: bool = False) -> SD3Transformer2DModel:
    """Three blocks, the last of which gives no text out; with `dual_attention` as in SD3.5-medium, attn2 in the first
    two."""
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * HIDDEN,
        caption_projection_dim=HIDDEN,
        pooled_projection_dim=2 * HIDDEN,
        out_channels=4,
        pos_embed_max_size=6,
        dual_attention_layers=(0, 1) if dual_attention else (),
        qk_norm="rms_norm" if dual_attention else None,
    ).eval()


def sd3_pipeline(seed: int = 0, *, dual_attention: bool = False, t5: bool = True) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline of about 1 MB: pictures of 32 x 32, 4 tokens, 96 at the most."""
    transformer = sd3_transformer(seed, dual_attention=dual_attention)
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.2, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer, layers=2)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, layers=2)).eval(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(tokenizer_3, width=2 * HIDDEN) if t5 else None,
        tokenizer_3=tokenizer_3 if t5 else None,
    )


def sdxl_unet(seed: int = 0) -> UNet2DConditionModel:
    """SDXL's three levels of two residual blocks, attention on the lower two, told sizes and crops."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=2 * HIDDEN,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=HIDDEN + 6 * 8,
    ).eval()


def sdxl_scheduler(prediction: str = "epsilon", *, zero_snr: bool = False) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
        steps_offset=0 if zero_snr else 1,
    )


def sdxl_pipeline(seed: int = 0, *, prediction: str = "epsilon", zero_snr: bool = False) -> StableDiffusionXLPipeline:
    """A StableDiffusionXLPipeline of about 1.3 MB: pictures of 32 x 32."""
    unet = sdxl_unet(seed)
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(clip_config(tokenizer, layers=2)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, layers=2)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=sdxl_scheduler(prediction, zero_snr=zero_snr),
        add_watermarker=False,
    )


def clip_config(tokenizer: CLIPTokenizer, *, layers: int = 1) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5(tokenizer: T5TokenizerFast, *, width: int = HIDDEN) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_ff=HIDDEN, d_kv=16, num_layers=1, num_heads=2)
    ).eval()


def autoencoder(**more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        **more,
    ).eval()


def save_flux(folder: Path, seed: int = 0, *, guidance_embeds: bool = False) -> Path:
    """Save the tiny pipeline with a `qrlora.json` that makes generating quick."""
    return save(flux_pipeline(seed, guidance_embeds=guidance_embeds), folder, "tiny-flux", GENERATION)


def save_sd3(folder: Path, seed: int = 0, *, dual_attention: bool = False, t5: bool = True) -> Path:
    """Likewise."""
    return save(sd3_pipeline(seed, dual_attention=dual_attention, t5=t5), folder, "tiny-sd3", SD3_GENERATION)


def save_sdxl(folder: Path, seed: int = 0, *, prediction: str = "epsilon", zero_snr: bool = False) -> Path:
    """Likewise."""
    return save(sdxl_pipeline(seed, prediction=prediction, zero_snr=zero_snr), folder, "tiny-sdxl", SDXL_GENERATION)


def save(pipeline: DiffusionPipeline, folder: Path, name: str, generation: Mapping[str, Any]) -> Path:
    """Any pipeline, with a `qrlora.json`."""
    pipeline.save_pretrained(folder)
    settings = {"name": name, "generation": generation, "training": {"resolution": 32, "rank": 4}}
    (folder / "qrlora.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
