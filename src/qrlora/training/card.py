"""The model card of a finished run: what the adapter is and how to use it, in the hub's format."""

import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from qrlora import starter
from qrlora.errors import QrloraWarning
from qrlora.formats import Adapter, atomic_write
from qrlora.models import LoadedModel
from qrlora.training.config import TrainConfig
from qrlora.training.folder import RESULT
from qrlora.training.validation import last_pictures

CARD = "README.md"
MARK = "<!-- Written by qrlora, and written over by its next training here; take this line out to keep the file. -->"
_CAPTIONS = 5


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Attributes:
        config: with nothing left open.
        model: the base.
        adapter: as it is written.
        captions: the first distinct captions of the pictures.
        trigger_words: of the captions.
        repository: where it is pushed to, if it is.
    """

    config: TrainConfig
    model: LoadedModel
    adapter: Adapter
    captions: Sequence[str]
    trigger_words: Sequence[str]
    repository: str | None = None

    @property
    def device(self) -> str:
        """The kind it was trained on, such as "cuda"."""
        return self.model.device.type

    @property
    def pictures(self) -> list[str]:
        """Those of the last validation, relative to the run's folder."""
        return last_pictures(self.config)

    @property
    def embedded(self) -> bool:
        """Whether the base is the one that comes with qrlora."""
        return self.model.source == str(starter.path())

    @property
    def hub_base(self) -> str | None:
        """The base model's hub id; None for a folder, whose path is nobody else's business, or one built in memory."""
        source = self.model.source
        return None if source is None or Path(source).is_dir() else source

    @property
    def typed_base(self) -> str:
        """The base model as it is typed."""
        return self.hub_base or f"PATH/TO/{Path(self.model.model_id).name}"

    @property
    def timesteps(self) -> str | None:
        """The range trained on, such as `500-1000`; None for all."""
        low, high = self.config.min_timestep, self.config.max_timestep
        return None if (low, high) == (0, 1000) else f"{low:g}-{high:g}"


def write_card(facts: CardFacts) -> None:
    """Write `README.md` into the run's folder; one that is not of qrlora stays, unless `overwrite` is set."""
    path = Path(facts.config.output_dir) / CARD
    if path.exists() and not facts.config.overwrite and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        warnings.warn(
            f"{path} is not of qrlora and stays as it is, so there is no card of this training; with overwrite: true "
            "there is.",
            QrloraWarning,
            stacklevel=2,
        )
        return
    atomic_write(path, card_text(facts))


def card_text(facts: CardFacts) -> str:
    """The card as Markdown under its metadata."""
    header = facts.adapter.header
    kind = ["qr-lora"] if header is not None and header.side is not None else []
    gallery = ["template:sd-lora"] if facts.pictures else []
    metadata: dict[str, Any] = {
        "base_model": facts.hub_base,
        "base_model_relation": "adapter" if facts.hub_base else None,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", *kind, facts.model.family.name, *gallery],
        "instance_prompt": facts.captions[0] if facts.captions else None,
        "widget": [{"text": facts.config.validation_prompt, "output": {"url": url}} for url in facts.pictures],
    }
    data = ModelCardData(**{key: value for key, value in metadata.items() if value})
    body = "\n\n".join(part for part in _parts(facts) if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _parts(facts: CardFacts) -> Iterator[str]:
    base = "the base model that comes with qrlora" if facts.embedded else _code(facts.model.model_id)
    yield MARK
    yield f"# {Path(facts.config.output_dir).resolve().name}"
    yield f"An adapter, `{RESULT}`, for {base}, trained with qrlora {version('qrlora')}."
    yield _prompts(facts)
    yield "\n".join(f"![{_plain(facts.config.validation_prompt or '')}]({url})" for url in facts.pictures)
    yield "## Use it"
    if facts.timesteps is not None:
        yield (
            f"It was trained at timesteps {facts.timesteps} alone (0 is clean, 1000 pure noise). qrlora can let it act "
            "there alone, other tools at all timesteps."
        )
    yield _with_diffusers(facts)
    yield _with_qrlora(facts)
    yield "## Training"
    yield "\n".join(["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in _settings(facts))])
    yield "## Licence"
    yield (
        f"The licence of {base} applies to this adapter and to what is made with it; whoever shares it answers for the "
        "pictures it was trained on too."
    )


def _prompts(facts: CardFacts) -> str:
    if not facts.captions:
        return ""
    words = ", ".join(map(_code, facts.trigger_words))
    first = f"In a prompt, {words} calls for what it learned. " if words else ""
    listed = "\n".join(f"- {_code(caption)}" for caption in facts.captions[:_CAPTIONS])
    rest = "\n- and others" if len(facts.captions) > _CAPTIONS else ""
    return f"{first}Captions of its pictures:\n\n{listed}{rest}"


def _with_diffusers(facts: CardFacts) -> str:
    if facts.adapter.own and facts.adapter.form != "dora":
        return f"It is a {facts.adapter.form} adapter, which is more than a LoRA: qrlora alone reads it."
    pipeline = type(facts.model.pipeline).__name__
    dtype = "bfloat16" if facts.config.mixed_precision == "bf16" else "float32"
    where = "starter.path()" if facts.embedded else repr(facts.typed_base)
    lines = [
        "import torch",
        f"from diffusers import {pipeline}",
        *(["from qrlora import starter"] if facts.embedded else []),
        "",
        f"pipeline = {pipeline}.from_pretrained({where}, dtype=torch.{dtype}{_left_out(facts)}).to({facts.device!r})",
        f"pipeline.load_lora_weights({facts.repository or '.'!r}, weight_name={RESULT!r})",
        f"picture = pipeline(prompt={_prompt(facts)!r}, {_settings_of_pipeline(facts)}).images[0]",
        "picture.save('picture.png')",
    ]
    here = "" if facts.repository else ", in this folder"
    return _fenced("python", "\n".join(lines), f"With diffusers{here}:")


def _left_out(facts: CardFacts) -> str:
    """What diffusers must be told of encoders that the base is without."""
    named = [(name, name.replace("text_encoder", "tokenizer")) for name in facts.model.family.optional_components]
    pipeline = facts.model.pipeline  # encoders may be freed at the time, tokenizers never are
    return "".join(f", {each}=None" for pair in named if getattr(pipeline, pair[1]) is None for each in pair)


def _settings_of_pipeline(facts: CardFacts) -> str:
    family, defaults = facts.model.family, facts.model.defaults
    settings = {name: getattr(defaults, name) for name in family.generation_arguments}
    settings |= {"height": facts.config.resolution, "width": facts.config.resolution}
    written = [f"{name}={value!r}" for name, value in settings.items()]
    # Without a text, FLUX guides against nothing at all.
    if family.uses_negative(defaults) and (defaults.negative_prompt or family.guided_by == "true_cfg_scale"):
        against = repr(defaults.negative_prompt)
        if "negative_prompt" in signature(type(facts.model.pipeline).__call__).parameters:
            written.append(f"negative_prompt={against}")
        else:  # FLUX.2-klein's takes embeddings alone
            length = f"max_sequence_length={defaults.max_sequence_length}"
            written.append(f"negative_prompt_embeds=pipeline.encode_prompt({against}, {length})[0]")
    return ", ".join(written)


def _with_qrlora(facts: CardFacts) -> str:
    weight = "1" if facts.timesteps is None else f"1@{facts.timesteps}"
    model = "" if facts.embedded else f" --model {shlex.quote(facts.typed_base)}"
    prompt = shlex.quote(_prompt(facts))
    command = f"qrlora generate{model} --adapter {RESULT}={weight} --prompt {prompt} --output picture.png"
    return _fenced("sh", command, "With qrlora, at any weight and beside other adapters:")


def _prompt(facts: CardFacts) -> str:
    return facts.config.validation_prompt or (facts.captions[0] if facts.captions else "")


def _settings(facts: CardFacts) -> Iterator[tuple[str, str]]:
    """What decides the result, by the names of the configuration; what is at its default by omission is left out."""
    config, spec = facts.config, facts.config.adapter
    yield "layers", str(len(facts.adapter.layers))
    for component, companion in facts.adapter.companions.items():
        yield f"layers of {component}", str(len(companion.layers))
    told: dict[str, Any] = {f"adapter.{name}": getattr(spec, name) for name in ("rank", "lora_alpha", "basis", "mask")}
    told |= {f"adapter.{name}": getattr(spec, name) for name in ("form", "band", "blocks") if _differs(spec, name)}
    always = (
        "resolution",
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "optimizer",
        "learning_rate",
        "lr_scheduler",
        "weighting_scheme",
        "mixed_precision",
        "seed",
    )
    sometimes = (
        "train_text_encoder",
        "text_encoder_lr",
        "use_8bit_adam",
        "use_ema",
        "ema_decay",
        "snr_gamma",
        "min_timestep",
        "max_timestep",
        "guidance_scale",
        "random_flip",
    )
    told |= {name: getattr(config, name) for name in always}
    told |= {name: getattr(config, name) for name in sometimes if _differs(config, name)}
    for name, value in told.items():
        if value is not None:
            yield f"`{name}`", _code(f"{value:g}" if isinstance(value, float) else str(value))


def _differs(model: Any, name: str) -> bool:
    return getattr(model, name) != type(model).model_fields[name].default


def _code(text: str) -> str:
    """Inline code, whatever is in the text."""
    line = " ".join(text.split()).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def _plain(text: str) -> str:
    """Text that is no markup."""
    return re.sub(r"([\\\[\]<>*_`])", r"\\\1", " ".join(text.split()))


def _fenced(language: str, code: str, lead: str) -> str:
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))
    return f"{lead}\n\n{ticks}{language}\n{code}\n{ticks}"
