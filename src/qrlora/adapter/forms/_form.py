"""What a form answers, and the forms by name. The protocol is told in the package's docstring."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from qrlora.adapter._cache import BasisCache
from qrlora.adapter._spec import AdapterSpec
from qrlora.basis import Side, as_matrix, basis_names, has_bands, is_orthonormal, rank_limit
from qrlora.errors import QrloraError
from qrlora.formats import Header, LowRank

Factor = Literal["lora_A", "lora_B"]
FACTORS: tuple[Factor, Factor] = ("lora_A", "lora_B")
COEFFICIENTS = "coefficients"
NEEDS_MORE = {
    "lora_ga": "starts from gradients of the training data, which add_adapter does not have",
    "corda": "starts from statistics of activations, which add_adapter does not have",
    "eva": "starts from statistics of activations, which add_adapter does not have",
    "loftq": "replaces the base by a quantised one, and the base is never changed here",
    "orthogonal": "starts from random factors whose product is zero up to rounding only, so not exactly the base",
}
"""peft's other initialisations, and why they are not here."""


@dataclass(frozen=True)
class Start:
    """One layer's tensors, fp32 on the CPU."""

    pair: LowRank
    """Becomes lora_B and lora_A."""
    own: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The form's own tensors by key."""


@dataclass(frozen=True)
class Held:
    """One layer's adapter as it is now."""

    B: Tensor
    """`[out, r]`, for a convolution `[out, r, 1, 1]`."""
    A: Tensor
    """`[r, in]`, for a convolution `[r, in, kh, kw]`."""
    own: Mapping[str, Tensor]
    """By key, trained or not."""
    scale: float
    """`lora_alpha / rank`; within `update` times the weight given by `set_adapters`."""
    frozen: tuple[str, ...]
    """The parts peft keeps frozen: "lora_A", "lora_B"."""
    side: Side | None
    """`Header.side`."""
    layer: str
    """The layer's path; empty within `update`."""
    dense: Callable[[], Tensor]
    """The base weight `[out, in]` or `[out, in, kh, kw]`, dequantised where it is quantised."""
    through_A: Callable[[Tensor, Tensor], Tensor]
    """(tensor shaped like A with any number of rows, x) to what the layer's lora_A would give with it."""
    through_B: Callable[[Tensor, Tensor], Tensor]
    """(tensor shaped like B with any number of columns, h) likewise."""


class Form(ABC):
    """One way to adapt a layer. Objects have no state: what an adapter is lies in its tensors and its spec."""

    name: ClassVar[str]
    bases: ClassVar[tuple[str, ...]] = ()
    """Names for `AdapterSpec.basis` beyond the registered bases that mean this form."""
    fields: ClassVar[tuple[str, ...]] = ()
    """Fields of `AdapterSpec` that mean something to this form alone."""
    masks: ClassVar[bool] = False
    """Whether `AdapterSpec.mask` applies; otherwise it is "full"."""
    trained_own: ClassVar[tuple[str, ...]] = ()
    """Keys of own tensors that are trained."""
    has_update: ClassVar[bool] = False
    """Whether `update` replaces `scale * B (A x)`."""
    low_rank: ClassVar[bool] = True
    """Whether an export is an ordinary LoRA."""
    names_itself: ClassVar[bool] = True
    """Whether `Header.form` is set; the forms that `basis` and `side` describe need none."""

    def check(self, spec: AdapterSpec) -> None:
        """Refuse what this form cannot do, before anything is computed.

        Raises:
            QrloraError: an unknown basis, or a combination without meaning.
        """
        check_basis(spec)

    def rank_limit(self, weight: Tensor, spec: AdapterSpec, layer: str) -> int:
        """The largest `spec.rank` for a dense weight."""
        if spec.basis in basis_names():
            return rank_limit(weight, spec.basis, side=spec.side, layer=layer, bands=spec.bands)
        return min(as_matrix(weight, layer=layer).shape)

    @abstractmethod
    def start(self, weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> Start:
        """What a new adapter starts from on a layer of dense weight `[out, in]` or `[out, in, kh, kw]`."""

    def frozen(self, side: Side | None) -> tuple[Factor, ...]:
        """The factors that are not trained."""
        return ()

    def side(self, spec: AdapterSpec) -> Side | None:
        """The side of the frozen factor in an exported file: `Header.side`; None where neither factor is frozen."""
        return None

    def update(self, held: Held, x: Tensor, base: Callable[[], Tensor]) -> Tensor:
        """What the adapter adds to the layer's output; called where `has_update`.

        It must not depend on the other adapters, so that active ones add up in any order.

        Arguments:
            held: the tensors, with the weight of `set_adapters` in the scale.
            x: the layer's input, in the dtype of the coefficients or, under autocast, of the base.
            base: gives the base's own output for x, without its bias; costs a product with the whole weight where
                another adapter came before this one.
        """
        return held.scale * held.through_B(held.B, held.through_A(held.A, x))

    def export(self, held: Held) -> Start:
        """What a file holds, with the scale baked in, here into the trained factor (lora_B where both are)."""
        if held.scale == 1:
            return Start(LowRank(held.B, held.A), held.own)
        if "lora_B" in held.frozen and "lora_A" not in held.frozen:
            return Start(LowRank(held.B, times(held.A, held.scale)), held.own)
        return Start(LowRank(times(held.B, held.scale), held.A), held.own)

    def kept(self, held: Held) -> Mapping[str, Tensor]:
        """Frozen tensors that an exact resume needs and a file does not hold exactly, by "lora_A", "lora_B" or key."""
        return {}

    def check_saved(self, saved: Start, layer: str) -> None:
        """Refuse tensors of a file that are no adapter of this form; here any beside the pair of an ordinary LoRA.

        Raises:
            QrloraError: names the layer and the tensor.
        """
        if self.low_rank and saved.own:
            raise QrloraError(
                f"{layer} has {', '.join(sorted(saved.own))} beside its pair, which form {self.name!r} does not have; "
                "the file is damaged, or its header is of another one."
            )

    def resume(self, saved: Start, weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> Start:
        """The start of further training from what `export` gave, the scale of `spec` taken out again."""
        if spec.scale == 1:
            return saved
        B, A = saved.pair.B, saved.pair.A
        if "lora_B" in self.frozen(spec.side) and "lora_A" not in self.frozen(spec.side):
            return Start(LowRank(B, A * (1 / spec.scale)), saved.own)
        return Start(LowRank(B * (1 / spec.scale), A), saved.own)

    def rank(self, pair: LowRank) -> int:
        """The `spec.rank` of an exported pair."""
        return pair.rank

    def trained_size(self, pair: LowRank, own: Mapping[str, Tensor], header: Header | None) -> int:
        """How many numbers of one exported layer are trained, without masked ones."""
        return pair.A.numel() + pair.B.numel() + sum(own[key].numel() for key in self.trained_own)


_forms: dict[str, Form] = {}


def register_form(form: type[Form]) -> type[Form]:
    """Class decorator that makes a form available by its name.

    Raises:
        QrloraError: the name is taken.
    """
    if form.name in _forms:
        raise QrloraError(f"a form named {form.name!r} is registered already; choose another name.")
    _forms[form.name] = form()
    return form


def form_names() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_forms))


def own_bases() -> tuple[str, ...]:
    """What `AdapterSpec.basis` may be beyond the registered bases, plain LoRA first."""
    names = [name for form in _forms.values() for name in form.bases]
    return tuple(sorted(names, key=lambda name: (name != "lora", name)))


def form_named(name: str) -> Form:
    """A form by its name.

    Raises:
        QrloraError: there is none.
    """
    if name not in _forms:
        near = difflib.get_close_matches(name, _forms, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise QrloraError(f"there is no form of adapters {name!r}, only {', '.join(form_names())}{hint}")
    return _forms[name]


def form_of(spec: AdapterSpec) -> Form:
    """The form a spec asks for; see the package's docstring for "auto".

    Raises:
        QrloraError: an unknown name.
    """
    if spec.form != "auto":
        return form_named(spec.form)
    for form in _forms.values():
        if spec.basis in form.bases or any(is_given(spec, name) for name in form.fields):
            return form
    return form_named(COEFFICIENTS)


def check_spec(spec: AdapterSpec) -> None:
    """Refuse a spec that no denoiser can have, before there is one.

    Raises:
        QrloraError: an unknown basis or form, or a combination without meaning; it begins with the field's name.
    """
    form = form_of(spec)
    check_fields(spec, form)
    form.check(spec)


def is_given(spec: AdapterSpec, name: str) -> bool:
    """Whether a field differs from its default."""
    return getattr(spec, name) != type(spec).model_fields[name].default


def check_fields(spec: AdapterSpec, form: Form) -> None:
    """Refuse fields that only other forms understand.

    Raises:
        QrloraError: names the field and its form.
    """
    for other in _forms.values():
        for name in other.fields:
            if name not in form.fields and is_given(spec, name):
                raise QrloraError(
                    f"{name}={getattr(spec, name)!r} belongs to form={other.name!r}, not to {form.name!r}; drop one."
                )


def check_own_basis(spec: AdapterSpec) -> None:
    """For a form that has no frozen basis, refuse any basis but its own name.

    Raises:
        QrloraError: says what to write instead.
    """
    if spec.basis != spec.form and spec.form != "auto":
        raise QrloraError(f"form={spec.form!r} has no basis of its own; write basis={spec.form!r} instead.")
    if spec.band is not None:
        raise QrloraError(f"band={spec.band!r} needs a basis that has bands, and {spec.basis!r} has none.")


def check_basis(spec: AdapterSpec, *more: str, orthonormal: bool = False) -> None:
    """Refuse a basis that is neither registered nor one of `more`, or that has not what is asked of it.

    Raises:
        QrloraError: names the known ones, or what goes instead.
    """
    registered = spec.basis in basis_names()
    if not registered and spec.basis not in more:
        if spec.basis in own_bases():
            raise QrloraError(f"basis={spec.basis!r} does not go with form={spec.form!r}; leave the form at auto.")
        if spec.basis in NEEDS_MORE:
            raise QrloraError(f"basis={spec.basis!r} {NEEDS_MORE[spec.basis]}; use another basis.")
        known = ", ".join((*basis_names(), *own_bases()))
        raise QrloraError(f"basis={spec.basis!r} is not known; use one of {known}.")
    if orthonormal and registered and not is_orthonormal(spec.basis):
        raise QrloraError(f"form={form_of(spec).name!r} needs orthonormal vectors, which {spec.basis!r} has not.")
    if spec.band is not None and not (registered and has_bands(spec.basis)):
        banded = ", ".join(name for name in basis_names() if has_bands(name))
        raise QrloraError(
            f"band={spec.band!r} needs a basis in the order of singular values ({banded}), which {spec.basis!r} is not."
        )


def check_starts_at_base(spec: AdapterSpec, form: Form) -> None:
    """Refuse a random start where the form has none.

    Raises:
        QrloraError: as said.
    """
    if spec.init != "zero":
        raise QrloraError(f'init={spec.init!r} means nothing for form={form.name!r}; leave it at "zero".')


def times(tensor: Tensor, scale: float) -> Tensor:
    """A product rounded once."""
    return (tensor.double() * scale).float()


def shapes(weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of lora_B and lora_A for a weight."""
    return (weight.shape[0], rank, *(1 for _ in weight.shape[2:])), (rank, *weight.shape[1:])


def upper_triangle(tensor: Tensor, factor: Factor) -> Tensor:
    """The tensor with its masked entries zero: lora_A `[r, n]` upper triangular, lora_B `[m, r]` lower."""
    flat = tensor.flatten(1)
    return (flat.triu() if factor == "lora_A" else flat.tril()).reshape(tensor.shape)
