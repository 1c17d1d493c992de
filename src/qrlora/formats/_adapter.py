"""An adapter as data: one low-rank pair a layer, where it came from, and the text encoders' adapters beside it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._layers import each_layer, shapes_of

Component = Literal["transformer", "unet", "text_encoder", "text_encoder_2"]
DENOISERS: tuple[Component, ...] = ("transformer", "unet")
TEXT_ENCODERS: tuple[Component, ...] = ("text_encoder", "text_encoder_2")
"""Components whose adapters go along with a denoiser's, by the pipelines' names: those that may be a CLIP encoder."""
SaveDtype = Literal["fp32", "bf16"]
FORMAT_VERSION = 1

MAGNITUDE = "lora_magnitude_vector"
"""DoRA's own tensor, by peft's and diffusers' name."""
DORA = "dora"
BEYOND_LORA = {DORA: "it rescales every row of W + B A", "gated": "its update differs from token to token"}
"""Forms whose adapters have tensors beyond a low-rank pair, and why they are no LoRA."""


class Header(BaseModel):
    """The provenance that our files carry beside a vanilla LoRA, as JSON under the metadata key `qrlora`.

    `basis` and `side` say which factor is frozen: `lora_B` for side "output", `lora_A` for "input"; both are None where
    neither factor is a basis (plain LoRA, concatenated merges). `rank` is the largest over the layers. `fingerprint` is
    one SHA-256 over the fingerprints of all layers' bases. `band` is the slice "i/n" of a basis of n * rank singular
    vectors. `form` is what the adapter is beyond that (see `qrlora.adapter.forms`), None for coefficients on a basis
    and for plain LoRA. `weight_hashes` has one entry an adapted layer, "dtype:hash"; `base_hash` is the hash of all of
    them. `method`, `merged_from` are set on merged adapters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    basis: str | None = None
    side: Literal["output", "input"] | None = None
    band: str | None = None
    mask: Literal["full", "upper"] = "full"
    form: str | None = None
    rank: int = Field(gt=0)
    lora_alpha: float | None = None
    seed: int = 0
    fingerprint: str | None = None
    base_model: str | None = None
    base_hash: str | None = None
    weight_hashes: dict[str, str] = {}
    trigger_words: list[str] = []
    training: dict[str, Any] | None = None
    method: str | None = None
    merged_from: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class LowRank:
    """One layer's `dW = B A`, fp32 on the CPU, any scale (alpha / rank) baked in.

    Attributes:
        B: `[out, r]`, for a convolution `[out, r, 1, 1]`.
        A: `[r, in]`, for a convolution `[r, in, kh, kw]`.
    """

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it adapts: `(out, in)` or `(out, in, kh, kw)`."""
        return (self.B.shape[0], *self.A.shape[1:])

    def delta(self) -> Tensor:
        """The dense `dW` as a matrix `[out, in]` or `[out, in * kh * kw]`."""
        return self.B.flatten(1) @ self.A.flatten(1)

    def norm(self) -> float:
        """The Frobenius norm of `dW`, from r x r matrices in float64: `|B A|^2 = tr((B^T B) (A A^T))`."""
        B, A = self.B.flatten(1).double(), self.A.flatten(1).double()
        return max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0) ** 0.5  # in this order max keeps a nan


@dataclass(frozen=True)
class Adapter:
    """A whole adapter: its layers by module path inside the denoiser, and its header where it has one.

    Attributes:
        layers: module path (`transformer_blocks.0.attn.to_q`) to factors; of a CLIP encoder always with the part
            `text_model.` (`text_model.encoder.layers.0.self_attn.q_proj`), which some versions of transformers leave
            out. Those of an adapter that was read lazily are read from its file each time one is asked for.
        header: provenance, or None for a LoRA of another tool.
        component: the pipeline component it belongs to.
        own: module path to further tensors by key, for forms that are more than `W + B A`; see `check_low_rank`.
        companions: adapters of text encoders that were trained together with this one, by component. Each is an
            adapter with a header of its own, low-rank, and without companions.
    """

    layers: Mapping[str, LowRank]
    header: Header | None = None
    component: Component = "transformer"
    own: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Mapping[str, Tensor]])
    companions: "Mapping[Component, Adapter]" = field(default_factory=dict[Component, "Adapter"])
    # Where a file was read, so that messages can name it; no part of the adapter's value.
    source: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise QrloraError(f"{self.label} has no layers.")
        for name, pair in self.shapes.items():
            check_pair(name, pair)
        for component, companion in self.companions.items():
            self._check_companion(component, companion)

    def _check_companion(self, component: Component, companion: "Adapter") -> None:
        if component not in TEXT_ENCODERS or component == self.component:
            raise QrloraError(f"{self.label} cannot have an adapter of {component} beside that of {self.component}.")
        if companion.component != component or companion.companions or companion.own:
            raise QrloraError(
                f"{self.label}: the adapter of {component} is one of {companion.component}, has companions of its own "
                "or is more than W + B A."
            )

    @property
    def shapes(self) -> Mapping[str, LowRank]:
        """The layers for whoever looks at shapes and ranks alone: nothing is read, and values may not be there."""
        return shapes_of(self.layers)

    @property
    def rank(self) -> int:
        """The largest rank over the layers, without companions."""
        return max(pair.rank for pair in self.shapes.values())

    @property
    def components(self) -> "dict[Component, Adapter]":
        """This adapter without its companions, and these, by the component each belongs to."""
        return {self.component: self.alone(), **self.companions}

    def alone(self) -> "Adapter":
        """This adapter without its companions."""
        return replace(self, companions={}) if self.companions else self

    @property
    def label(self) -> str:
        """What messages call this adapter."""
        return self.source or "the adapter"

    @property
    def captions(self) -> list[str]:
        """The captions it was trained with, each once, where its header has them."""
        training = self.header.training if self.header is not None else None
        found = (training or {}).get("captions")
        return list(dict.fromkeys(map(str, cast(list[object], found)))) if isinstance(found, list) else []

    @property
    def form(self) -> str | None:
        """What the adapter is beyond coefficients or plain LoRA: its header's `form`, or "dora" for another tool's."""
        if self.header is not None and self.header.form is not None:
            return self.header.form
        return DORA if any(MAGNITUDE in own for own in self.own.values()) else None

    def check_low_rank(self, action: str) -> None:
        """Refuse an adapter that is more than `W + B A`.

        Args:
            action: what cannot be done, such as "merged".

        Raises:
            QrloraError: says why.
        """
        if self.own:
            why = BEYOND_LORA.get(self.form or "", "it is more than W + B A")
            raise QrloraError(f"{self.label} is a {self.form} adapter and cannot be {action}, since {why}.")

    def check_alone(self, action: str, way: str) -> None:
        """Refuse an adapter with companions, where they would be lost.

        Args:
            action: what cannot be done, such as "written as a peft folder".
            way: what to do instead.

        Raises:
            QrloraError: names the components.
        """
        if self.companions:
            raise QrloraError(
                f"{self.label} cannot be {action}, since its adapter of {' and '.join(self.companions)} would be lost; "
                f"{way}."
            )

    def scaled(self, weight: float) -> "Adapter":
        """The adapter and its companions times `weight`, which goes into the trained factor, so bases stay as they are.

        Raises:
            QrloraError: `weight` is not finite.
        """
        check_weight(weight)
        if weight == 1:
            return self

        def times_weight(_name: str, pairs: list[LowRank]) -> LowRank:
            return scaled_pair(pairs[0], weight, self.header)

        layers = each_layer([self.layers], times_weight)
        companions = {name: companion.scaled(weight) for name, companion in self.companions.items()}
        return replace(self, layers=layers, companions=companions)

    def save(self, path: str | Path, *, save_dtype: SaveDtype = "fp32", coefficients_only: bool = False) -> Path:
        """Write the native file: a vanilla diffusers LoRA with our header key; see `write_native`.

        Adapters of a form that no other tool knows get keys of their own; see `write_own_form`.
        With `coefficients_only`, write the trained factor alone; see `write_coefficients`.
        """
        from qrlora.formats._coefficients import write_coefficients
        from qrlora.formats._native import write_native
        from qrlora.formats._own_form import write_own_form

        whole = write_own_form if self.own and self.form != DORA else write_native
        write = write_coefficients if coefficients_only else whole
        return write(self, path, save_dtype=save_dtype)


def trained_factor(header: Header | None) -> Literal["A", "B"]:
    """The factor that carries scales and weights: the trained one, or `lora_B` where both are trained."""
    return "A" if header is not None and header.side == "output" else "B"


def scaled_pair(pair: LowRank, scale: float, header: Header | None) -> LowRank:
    """The pair times `scale`, which goes into the trained factor."""
    if scale == 1:
        return pair
    if trained_factor(header) == "A":
        return LowRank(pair.B, pair.A * scale)
    return LowRank(pair.B * scale, pair.A)


def same_weight(one: str, other: str) -> bool | None:
    """Whether two `label:hash` of a header mean one weight; None where they cannot tell.

    Hashes of one weight in two dtypes say nothing about each other, nor do those of two ways to quantise it.
    """
    if one == other:
        return True
    label = one.partition(":")[0]
    comparable = label == other.partition(":")[0] and not label.startswith("packed-")
    return False if comparable else None


def check_weight(weight: float) -> None:
    """Refuse a strength that is no finite number.

    Raises:
        QrloraError: it is infinite or nan.
    """
    if not math.isfinite(weight):
        raise QrloraError(f"an adapter weight of {weight} is not a finite number; give a real number such as 0.9.")


def check_pair(name: str, pair: LowRank) -> None:
    """Refuse factors that cannot be a low-rank pair, by the layer's name."""
    B, A = pair.B, pair.A
    linear = B.ndim == 2 and A.ndim == 2
    convolution = B.ndim == 4 and A.ndim == 4 and B.shape[2:] == (1, 1)
    if not (linear or convolution) or B.shape[1] != A.shape[0] or 0 in (*B.shape, *A.shape):
        raise QrloraError(
            f"{name}: lora_B {list(B.shape)} and lora_A {list(A.shape)} are no low-rank pair; expected [out, r] and "
            "[r, in], or [out, r, 1, 1] and [r, in, kh, kw]."
        )


def check_finite(key: str, tensor: Tensor) -> None:
    if not all_finite(tensor):
        raise QrloraError(f"{key} has values that are not finite (nan or inf); this adapter is damaged or diverged.")


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is nan or infinite: one read, where `isfinite` makes copies."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        flat = tensor.detach().view(-1)
        # Squares never cancel, so a finite sum has no other terms; it may also be too large for its dtype.
        if math.isfinite(float(torch.dot(flat, flat))):
            return True
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor))
