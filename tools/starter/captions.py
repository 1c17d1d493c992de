"""Captions of the training pictures, and the two byte-level BPE tokenizers trained on them."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

TRIGGERS = ("<c>", "<s>", *(f"<v{i}>" for i in range(1, 9)))
LENGTH = 32
VOCABULARY = 2048
EMPTY, NO_STYLE, NO_NAME, TRIGGER = 0.1, 0.08, 0.08, 0.12


def caption(name: str, style: str, treatment: str | None) -> str:
    """The whole caption, for instance "a red apple emoji in noto style as a line drawing"."""
    return " ".join(part for part in (f"a {name} emoji", f"in {style} style", treatment) if part)


def dropped(name: str, style: str, treatment: str | None, random: torch.Generator) -> str:
    """A caption as trained on: now and then empty, without style or name, or with triggers for words."""
    draw, which, where = torch.rand(3, generator=random).tolist()
    if draw < EMPTY:
        return ""
    if draw < EMPTY + NO_STYLE:
        return f"a {name} emoji"
    if draw < EMPTY + NO_STYLE + NO_NAME:
        return caption("", style, treatment).replace("a  emoji", "an emoji")
    if draw < EMPTY + NO_STYLE + NO_NAME + TRIGGER:
        trigger = TRIGGERS[int(which * len(TRIGGERS))]
        if where < 0.5:
            return caption(trigger, style, treatment)
        if where < 0.75:
            return caption(name, trigger, None)
        words = caption(name, style, treatment).split()
        words[int(where * 1e6) % len(words)] = trigger
        return " ".join(words)
    return caption(name, style, treatment)


def train_tokenizers(captions: list[str]) -> tuple[CLIPTokenizer, PreTrainedTokenizerFast]:
    """One in CLIP's layout (words end in `</w>`), one in T5's (`</s>` at the end, `<pad>` to the length)."""
    return _clip(captions), _t5(captions)


def _clip(captions: list[str]) -> CLIPTokenizer:
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    raw.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in sorted(alphabet))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TRIGGERS),
        special_tokens=specials,
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    raw.train_from_iterator(captions, trainer)
    model = json.loads(raw.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=LENGTH)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in TRIGGERS])
    return tokenizer


def _t5(captions: list[str]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    specials = ["<pad>", "</s>", *TRIGGERS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(captions, trainer)
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="</s>", model_max_length=LENGTH
    )


def save_tokenizers(folder: Path, clip: CLIPTokenizer, t5: PreTrainedTokenizerFast) -> None:
    """Write both where `FluxPipeline.from_pretrained` looks for them."""
    clip.save_pretrained(folder / "tokenizer")
    t5.save_pretrained(folder / "tokenizer_2")
