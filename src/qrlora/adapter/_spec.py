"""What an adapter is to be."""

import re
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qrlora.adapter.blocks import Blocks, check_blocks
from qrlora.basis import Band, Side, Solver
from qrlora.errors import QrloraError

PLAIN_LORA = "lora"


class AdapterSpec(BaseModel):
    """The kind of adapter that `add_adapter` puts on a denoiser.

    Attributes:
        rank: r, the number of basis vectors a layer.
        lora_alpha: the trained factor is scaled by `lora_alpha / rank`; None means rank, a scale of 1.
        basis: a registered basis ("qr", "svd", "minor", "random", "ica"), or "lora": plain LoRA, both factors trained.
        form: what is trained, and how the layer computes; see `qrlora.adapter.forms`. "coefficients" trains the factor
            beside a frozen basis. "auto" is "coefficients" for a basis, and the baseline's own form for a baseline.
        side: "output" freezes lora_B to the basis, "input" lora_A; without meaning for plain LoRA.
        band: "0/2" is the first of two bands of a basis of `2 * rank` singular vectors, "1/2" the second: `rank` is the
            band's. Adapters in different bands have orthogonal update spaces. For qr, svd and minor.
        mask: "upper" trains the upper triangle of the coefficients alone (the published default); "full" trains all.
            Always "full" for forms without a single factor of coefficients.
        init: the coefficients start at "zero", exactly the base model, or "normal".
        init_std: standard deviation of the "normal" start.
        target_modules: "auto" (the list of the model's family), a regular expression that matches whole module paths,
            or a list of names, each matching a path's last whole components ("attn.to_q").
        blocks: the part of the network that is adapted: a preset ("b-lora", "splitflux", ...), a range such as
            "single_transformer_blocks.10-37", a regular expression for the beginning of paths, or a list of these; all
            of it where None.
        experts: for form "gated": how many equal spectral bands of the rank a gate weighs for every token (4 or 8).
            Giving it asks for that form.
        top_k: for form "gated": only the k experts of largest weight act on a token; all where None.
        solver: how the basis is computed; "auto" chooses by shape.
        seed: of random starts and of the random basis.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=64, gt=0)
    lora_alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    basis: str = "qr"
    form: str = "auto"
    side: Side = "output"
    band: str | None = None
    mask: Literal["full", "upper"] = "upper"
    init: Literal["zero", "normal"] = "zero"
    init_std: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    target_modules: str | list[str] = "auto"
    blocks: Blocks | None = None
    experts: int | None = Field(default=None, ge=2)
    top_k: int | None = Field(default=None, ge=1)
    solver: Solver = "auto"
    seed: int = 0

    @field_validator("form")
    @classmethod
    def _form_is_known(cls, form: str) -> str:
        from qrlora.adapter.forms import form_named  # the forms stand on this module

        if form != "auto":
            try:
                form_named(form)
            except QrloraError as error:
                raise ValueError(str(error)) from error
        return form

    @field_validator("blocks")
    @classmethod
    def _blocks_are_valid(cls, blocks: Blocks | None) -> Blocks | None:
        if blocks is not None:
            try:
                check_blocks(blocks)
            except QrloraError as error:
                raise ValueError(str(error)) from error
        return blocks

    @field_validator("band")
    @classmethod
    def _band_is_one_of_some(cls, band: str | None) -> str | None:
        if band is not None:
            found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", band)
            if found is None or int(found[2]) < 2 or int(found[1]) >= int(found[2]):
                raise ValueError(f'{band!r} is no band; "0/2" is the first of two, "1/2" the second')
        return band

    @model_validator(mode="before")
    @classmethod
    def _mica_is_minor(cls, values: Any) -> Any:
        """MiCA (arXiv 2604.01694, in peft) is the minor basis on the output side, unmasked."""
        given = cast(dict[str, Any], values) if isinstance(values, dict) else {}
        if given.get("basis") != "mica":
            return cast(Any, values)
        meant = {"side": "output", "mask": "full"}
        for key, value in meant.items():
            if given.get(key, value) != value:
                raise ValueError(f"basis='mica' means {key}={value!r}, not {given[key]!r}; use basis='minor' for that")
        if given.get("form", "auto") not in ("auto", "coefficients"):
            raise ValueError(f"basis='mica' does not go with form={given['form']!r}; use basis='minor' for that")
        return given | {"basis": "minor", **meant}

    @model_validator(mode="after")
    def _mask_only_where_it_means_something(self) -> Self:
        from qrlora.adapter.forms import form_of

        if not form_of(self).masks:
            object.__setattr__(self, "mask", "full")
        return self

    @property
    def plain(self) -> bool:
        """Whether this is plain LoRA, with no frozen basis."""
        return self.basis == PLAIN_LORA

    @property
    def bands(self) -> int:
        """How many bands the basis is cut into; 1 where it is whole."""
        return self.slice.count

    @property
    def slice(self) -> Band:
        """The band, as `make_basis` takes it."""
        index, _, count = (self.band or "0/1").partition("/")
        return Band(int(index), int(count))

    @property
    def scale(self) -> float:
        """`lora_alpha / rank`."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.rank
