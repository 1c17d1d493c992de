"""What an adapter is to be."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qrlora.basis import Side, Solver

PLAIN_LORA = "lora"


class AdapterSpec(BaseModel):
    """The kind of adapter that `add_adapter` puts on a denoiser.

    Attributes:
        rank: r, the number of basis vectors a layer.
        lora_alpha: the trained factor is scaled by `lora_alpha / rank`; None means rank, a scale of 1.
        basis: a registered basis ("qr", "svd", "minor", "random"), or "lora": plain LoRA, both factors trained.
        side: "output" freezes lora_B to the basis, "input" lora_A; without meaning for plain LoRA.
        mask: "upper" trains the upper triangle of the coefficients alone (the published default); "full" trains all.
            Always "full" for plain LoRA.
        init: the coefficients start at "zero", exactly the base model, or "normal".
        init_std: standard deviation of the "normal" start.
        target_modules: "auto" (the list of the model's family), a regular expression that matches whole module paths,
            or a list of names, each matching a path's last whole components ("attn.to_q").
        solver: how the basis is computed; "auto" chooses by shape.
        seed: of random starts and of the random basis.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=64, gt=0)
    lora_alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    basis: str = "qr"
    side: Side = "output"
    mask: Literal["full", "upper"] = "upper"
    init: Literal["zero", "normal"] = "zero"
    init_std: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    target_modules: str | list[str] = "auto"
    solver: Solver = "auto"
    seed: int = 0

    @model_validator(mode="after")
    def _plain_lora_has_no_mask(self) -> Self:
        if self.plain:
            object.__setattr__(self, "mask", "full")
        return self

    @property
    def plain(self) -> bool:
        """Whether this is plain LoRA, with no frozen basis."""
        return self.basis == PLAIN_LORA

    @property
    def scale(self) -> float:
        """`lora_alpha / rank`."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.rank
