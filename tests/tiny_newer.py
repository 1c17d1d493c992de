"""Tiny pipelines of the newer families and of Stable Diffusion 1.5, of the true classes, built with no network."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny_pipelines import (
    GENERATION,
    HIDDEN,
    SD3_GENERATION,
    SDXL_GENERATION,
    autoencoder,
    clip_config,
    clip_tokenizer,
    save,
)

LENGTH = 64
NEWER_GENERATION = {**SD3_GENERATION, "max_sequence_length": LENGTH}
QWEN_GENERATION = {**GENERATION, "max_sequence_length": LENGTH}
# The shape of the models' own templates: roles in turns, and for thinking models an empty thought where none is wanted.
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for message in messages %}{% set text = message.content[0].text %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]"
    "{% endif %}{% endfor %}"
)
# Words that the real vocabulary has whole, so that Qwen-Image's template begins with 34 tokens here too.
_WORDS = (
    *("system", "user", "assistant", "Describe", "detailing", "color", "shape", "size", "texture", "quantity", "text"),
    *("spatial", "relationships", "image", "by", "objects", "and", "background", "the", "of"),
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Every byte a token, but for the marks and the words of the models' own templates."""
    pieces = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={piece: row for row, piece in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>", *_WORDS, *(f" {word}" for word in _WORDS)])
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def mistral_tokenizer() -> Qwen2Tokenizer:
    """The same bytes in place of FLUX.2-dev's processor, which needs torchvision and of which texts use this alone."""
    marks = ["<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    pieces = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={piece: row for row, piece in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.add_tokens([SYSTEM_MESSAGE])
    tokenizer.chat_template = MISTRAL_CHAT
    return tokenizer


def _language(layers: int, vocabulary: int, width: int = 16) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "max_position_embeddings": 2048,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    }


def _qwen3(layers: int, vocabulary: int, width: int = 16) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**_language(layers, vocabulary, width), tie_word_embeddings=True)).eval()


def sd15_unet(seed: int = 0, *, resnets: int = 1) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's four levels, attention on all but the lowest, each with one residual block of its two."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=resnets,
        attention_head_dim=2,
        cross_attention_dim=HIDDEN,
        norm_num_groups=4,
    ).eval()


def sd15_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of about 0.6 MB without a safety checker: pictures of 32 x 32."""
    unet, tokenizer = sd15_unet(seed), clip_tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder(scaling_factor=0.18215),
        text_encoder=CLIPTextModel(clip_config(tokenizer, layers=2)).eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux2_transformer(seed: int = 0, *, guidance_embeds: bool = False, context: int = 48) -> Flux2Transformer2DModel:
    torch.manual_seed(seed)
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=context,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()


def _flux2_autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    ).eval()
    # As if learned: a fresh batch norm's 0 and 1 would hide a wrong order of channels.
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return vae


def _dynamic_scheduler(**more: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, **more)


def flux2_pipeline(seed: int = 0) -> Flux2Pipeline:
    """A Flux2Pipeline of about 1 MB, as dev: pictures of 32 x 32, 4 tokens; Mistral's 30 layers."""
    transformer, tokenizer = flux2_transformer(seed, guidance_embeds=True, context=24), mistral_tokenizer()
    config = Mistral3Config(
        text_config=MistralConfig(**_language(30, len(tokenizer), width=8)),
        vision_config=PixtralVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
        ),
    )
    encoder = Mistral3ForConditionalGeneration(config).eval()
    return Flux2Pipeline(_dynamic_scheduler(), _flux2_autoencoder(), encoder, tokenizer, transformer)


def flux2_klein_pipeline(seed: int = 0, *, distilled: bool = False) -> Flux2KleinPipeline:
    """A Flux2KleinPipeline of about 1 MB, base or distilled."""
    transformer, tokenizer = flux2_transformer(seed, context=24), qwen_tokenizer()
    encoder = _qwen3(27, len(tokenizer), width=8)
    return Flux2KleinPipeline(
        _dynamic_scheduler(), _flux2_autoencoder(), encoder, tokenizer, transformer, is_distilled=distilled
    )


def qwen_image_transformer(seed: int = 0) -> QwenImageTransformer2DModel:
    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def qwen_image_pipeline(seed: int = 0) -> QwenImagePipeline:
    """A QwenImagePipeline of about 1 MB: an autoencoder of videos with 4 latent channels, pictures of 32 x 32."""
    transformer, tokenizer = qwen_image_transformer(seed), qwen_tokenizer()
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    text = {**_language(2, len(tokenizer)), "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075],
        latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
    ).eval()
    scheduler = _dynamic_scheduler(shift_terminal=0.02)
    return QwenImagePipeline(scheduler, vae, encoder, tokenizer, transformer)


def z_image_transformer(seed: int = 0) -> ZImageTransformer2DModel:
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=HIDDEN,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    ).eval()
    with torch.no_grad():  # zeros would hide whether anything is padded
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return transformer


def z_image_pipeline(seed: int = 0) -> ZImagePipeline:
    """A ZImagePipeline of about 0.6 MB: pictures of 32 x 32, 4 tokens, padded to 32 as all are."""
    transformer, tokenizer = z_image_transformer(seed), qwen_tokenizer()
    vae = autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return ZImagePipeline(scheduler, vae, _qwen3(2, len(tokenizer)), tokenizer, transformer)


def save_sd15(folder: Path, seed: int = 0) -> Path:
    """Save the tiny pipeline with a `qrlora.json` that makes generating quick."""
    return save(sd15_pipeline(seed), folder, "tiny-sd15", SDXL_GENERATION)


def save_flux2(folder: Path, seed: int = 0) -> Path:
    """Likewise."""
    return save(flux2_pipeline(seed), folder, "tiny-flux2", NEWER_GENERATION)


def save_flux2_klein(folder: Path, seed: int = 0, *, distilled: bool = False) -> Path:
    """Likewise."""
    settings = {**NEWER_GENERATION, "guidance_scale": 1.0} if distilled else NEWER_GENERATION
    return save(flux2_klein_pipeline(seed, distilled=distilled), folder, "tiny-flux2-klein", settings)


def save_qwen_image(folder: Path, seed: int = 0) -> Path:
    """Likewise."""
    return save(qwen_image_pipeline(seed), folder, "tiny-qwen-image", QWEN_GENERATION)


def save_z_image(folder: Path, seed: int = 0) -> Path:
    """Likewise."""
    return save(z_image_pipeline(seed), folder, "tiny-z-image", NEWER_GENERATION)
