"""Everything a training run can be told, under the names of the diffusers scripts."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from qrlora.adapter import AdapterSpec, check_encoder_spec, check_spec
from qrlora.errors import QrloraError
from qrlora.models import Offload, Quantization
from qrlora.training.inputs import Inputs
from qrlora.training.keys import nest, overlay

Memory = Literal["6gb", "8gb", "12gb", "16gb", "24gb", "max"]
Weighting = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]
Optimizer = Literal["adamw", "prodigy"]
LrScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


USERS_OWN = frozenset(
    {
        "model",
        "instance_data_dir",
        "dataset_name",
        "class_data_dir",
        "output_dir",
        "overwrite",
        "resume",
        "init_from",
        "report_to",
        "logging_dir",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "device",
    }
)
"""Where things are read and written, and what is sent away: no model's defaults decide that."""


class TrainConfig(Inputs):
    """One training run. What is not given is taken from the model's training defaults, else from here."""

    output_dir: str
    """Receives adapter.safetensors, config.yaml, losses.json, checkpoints and validation pictures."""
    overwrite: bool = False
    """Replace an earlier result in output_dir."""

    adapter: AdapterSpec = AdapterSpec()

    seed: int = Field(default=0, ge=0, lt=2**63)
    train_batch_size: int = Field(default=1, gt=0)
    """Per process; every item draws its own picture, noise level and noise."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    max_train_steps: int = Field(default=1000, gt=0)
    """Optimiser steps."""
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """With prodigy a factor on the rate that it finds, and 1.0 where not given, whatever the model's defaults say."""
    train_text_encoder: bool = False
    """Train adapters of the CLIP text encoders too (FLUX one, SD3 and SDXL two); T5 stays as it is."""
    text_encoder_lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Of those; none means learning_rate."""
    lr_scheduler: LrScheduler = "constant"
    lr_warmup_steps: int = Field(default=0, ge=0)
    lr_num_cycles: int = Field(default=1, gt=0)
    lr_power: float = Field(default=1.0, gt=0)
    optimizer: Optimizer = "adamw"
    """prodigy finds the learning rate itself (arXiv 2306.06101); it takes adam_beta1 to adam_epsilon too."""
    use_8bit_adam: bool = False
    """AdamW with its states in 8 bits (bitsandbytes): a quarter of the memory."""
    prodigy_beta3: float | None = Field(default=None, gt=0, lt=1)
    """Of the running averages of prodigy's estimate; none means the square root of adam_beta2."""
    prodigy_decouple: bool = True
    """Weight decay as in AdamW rather than through the gradient."""
    prodigy_use_bias_correction: bool = True
    """Adam's bias correction in prodigy."""
    prodigy_safeguard_warmup: bool = True
    """Keep a warm-up of the learning rate from inflating prodigy's estimate."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    adam_epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this 2-norm over all coefficients; .inf never clips."""
    use_ema: bool = False
    """Keep an exponential moving average of the coefficients: the files and validation pictures are made of it."""
    ema_decay: float = Field(default=0.9999, gt=0, lt=1)
    """The largest decay of the average. After t steps it is at most t / (9 + t): below 90,000 steps the average is over
    about the last tenth of the run."""
    weighting_scheme: Weighting = "none"
    """How noise levels are drawn and weighted; none is uniform, the published setting."""
    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0)
    mode_scale: float = 1.29
    snr_gamma: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Min-SNR weighting, on models that predict noise or v (SDXL); 5.0 is usual."""
    min_timestep: float = Field(default=0, ge=0, lt=1000)
    """Train at noise levels from this timestep on; 0 is clean, 1000 pure noise."""
    max_timestep: float = Field(default=1000, gt=0, le=1000)
    """Train at noise levels up to this timestep."""
    guidance_scale: float = 1.0
    """The guidance embedding while training, on models that have one (FLUX.1-dev); not classifier-free guidance."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """bf16: base and activations in bfloat16, coefficients in fp32. None: bf16 on CUDA, no elsewhere."""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time."""
    memory: Memory | None = None
    """6gb, 8gb, 12gb, 16gb, 24gb or max: gradient_checkpointing, quantization, offload and encoder_offload for a card
    of that size, where they are not given; see `qrlora estimate`."""
    quantization: Quantization | None = None
    """The denoiser's frozen weights in 4 bits (nf4, by bitsandbytes) or in 8 (int8 or fp8, by torchao)."""
    offload: Offload = "none"
    """blocks: the denoiser's frozen blocks stay in the CPU's memory, each on the device only while it computes; they
    are computed twice a step, as with gradient_checkpointing."""
    encoder_offload: Offload = "none"
    """blocks: those of the text encoders likewise, while captions are encoded."""
    device: str | None = None
    """cpu, cuda, mps... None: accelerate's choice, or where the loaded model is."""

    checkpointing_steps: int = Field(default=250, gt=0)
    checkpoints_total_limit: int | None = Field(default=None, gt=0)
    """Keep this many of the newest checkpoints; none keeps all."""
    resume: str | None = None
    """"latest", or a checkpoint folder: continue that run exactly."""
    init_from: str | None = None
    """An adapter file to start a new run from."""
    validation_prompt: str | None = None
    """Make pictures of this prompt while training, under output_dir/validation."""
    validation_steps: int = Field(default=100, gt=0)
    num_validation_images: int = Field(default=1, gt=0)
    report_to: str | None = None
    """tensorboard, wandb, trackio... (accelerate's trackers)."""
    logging_dir: str = "logs"
    """Within output_dir."""
    save_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the resulting file; checkpoints are always fp32."""
    push_to_hub: bool = False
    """Upload the result (adapter, card and the card's pictures) to the hub, with the login of hf auth login or
    HF_TOKEN."""
    hub_model_id: str | None = None
    """The repository; none means the name of output_dir, under your own name."""
    hub_private_repo: bool | None = None
    """Whether a new repository is private; none means the hub's default for you."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false

    @field_validator("optimizer", mode="before")
    @classmethod
    def _as_in_diffusers(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value  # its scripts write AdamW

    @model_validator(mode="before")
    @classmethod
    def _rate_of_prodigy(cls, values: Any) -> Any:
        """As if it had been given: a model's default rate is for AdamW."""
        if isinstance(values, Mapping) and str(values.get("optimizer")).lower() == "prodigy":
            return {"learning_rate": 1.0, **values}
        return values

    @model_validator(mode="after")
    def _exclusive(self) -> Self:
        if self.resume is not None and self.init_from is not None:
            raise QrloraError(
                "resume and init_from exclude each other: resume continues a run with its optimiser and step count, "
                "init_from starts a new run from an adapter's weights; drop one of them."
            )
        if self.min_timestep >= self.max_timestep:
            raise QrloraError(f"min_timestep={self.min_timestep} must be below max_timestep={self.max_timestep}.")
        if self.snr_gamma is not None and self.weighting_scheme in ("sigma_sqrt", "cosmap"):
            raise QrloraError(
                f"snr_gamma={self.snr_gamma} and weighting_scheme={self.weighting_scheme} both weight the loss; drop "
                "one."
            )
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise QrloraError(f"use_8bit_adam is for AdamW, not for optimizer: {self.optimizer}; drop one of them.")
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise QrloraError(
                f"text_encoder_lr={self.text_encoder_lr} is of text encoders that are trained; set train_text_encoder: "
                "true, or drop it."
            )
        if self.optimizer == "prodigy" and self.text_encoder_lr not in (None, self.learning_rate):
            raise QrloraError(
                f"text_encoder_lr={self.text_encoder_lr}: prodigy takes one learning_rate for all; drop it."
            )
        if self.adapter.lora_alpha is not None and self.adapter.lora_alpha <= 0:
            raise QrloraError(f"adapter.lora_alpha={self.adapter.lora_alpha} must be above 0.")
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "the training configuration") -> Self:
        """Validate a nested mapping; dotted keys (`adapter.rank`) reach into sections.

        Raises:
            QrloraError: the first problem, with its key; an unknown key with the nearest valid one.
        """
        nested = nest(values)
        try:
            config = cls.model_validate(nested)
        except ValidationError as error:
            raise QrloraError(_sentence(error, source)) from error
        try:
            check_spec(config.adapter)
            if config.train_text_encoder:
                check_encoder_spec(config.adapter)
        except QrloraError as error:
            names_a_key = re.match(r"\w+=", str(error)) is not None
            raise QrloraError(f"{source}: {'adapter.' if names_a_key else ''}{error}") from error
        return config

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a YAML file; `overrides` (dotted keys) win over it."""
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise QrloraError(f"the configuration {path} cannot be read: {error.strerror or error}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise QrloraError(f"the configuration {path} is not YAML: {' '.join(str(error).split())}.") from error
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise QrloraError(f"the configuration {path} must be a mapping of keys to values.")
        return cls.parse(overlay(nest(values), nest(overrides or {})), str(path))

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """Fill what was not given from `defaults`, in which adapter fields may stand at the top level (`rank`).

        Raises:
            QrloraError: defaults that are not valid, or that are the user's alone to set.
        """
        for key in USERS_OWN & defaults.keys():
            raise QrloraError(f"the model's training defaults set {key}, which only you may; take it out of them.")
        given = self.model_dump(exclude_unset=True)
        nested = dict(defaults)
        lifted = {key: nested.pop(key) for key in list(nested) if key in AdapterSpec.model_fields and not _own(key)}
        nested["adapter"] = {**lifted, **nested.get("adapter", {})}
        return self.parse(overlay(nested, given), "the model's training defaults")

    def to_yaml(self) -> str:
        """Every key and value; `from_yaml` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _own(key: str) -> bool:
    return key in TrainConfig.model_fields


def _sentence(error: ValidationError, source: str) -> str:
    # An unknown key first: it is often the reason why a required one seems missing.
    problem = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if path == ["hub_token"]:
        return (
            f"{source}: hub_token is not taken, since it would be written to config.yaml; log in with hf auth login, "
            "or set HF_TOKEN."
        )
    if problem["type"] == "extra_forbidden":
        return f"{source}: unknown key {key}{_nearest(path)}"
    if problem["type"] == "missing":
        return f"{source}: {key} is missing; give it."
    return f"{source}: {key}={problem['input']!r} is not valid: {problem['msg']}."


def _nearest(path: list[str]) -> str:
    here = AdapterSpec.model_fields if path[0] == "adapter" and len(path) > 1 else TrainConfig.model_fields
    prefix = "adapter." if here is AdapterSpec.model_fields else ""
    names: Iterable[str] = [f"{prefix}{name}" for name in here]
    close = difflib.get_close_matches(".".join(path), names, n=1, cutoff=0.5)
    if not close:
        elsewhere = [*TrainConfig.model_fields, *(f"adapter.{name}" for name in AdapterSpec.model_fields)]
        close = [name for name in elsewhere if name.rpartition(".")[2] == path[-1]][:1]
        close = close or difflib.get_close_matches(path[-1], elsewhere, n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?"
