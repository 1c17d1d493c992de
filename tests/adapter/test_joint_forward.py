"""Plain adapters of a Linear in one product: what peft's own layers compute, and dense float64, whatever is beside."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Conv2d, LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qrlora.adapter import (
    adapter_of,
    adapters_disabled,
    add_adapter,
    attach_adapter,
    remove_adapter,
    save_adapter,
    set_adapters,
    trainable_parameters,
)
from tests.adapter.test_add_adapter import KINDS, shake, spec_for
from tests.tiny_models import inputs, output, run, tiny, tiny_flux

# peft warns whenever a second adapter is loaded.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
LAYER = "transformer_blocks.0.attn.to_q"
SIDES: dict[str, dict[str, Any]] = {
    "output": {},
    "input": {"side": "input", "lora_alpha": 9.0},
    "lora": {"basis": "lora", "lora_alpha": 3.0},
}


def adapted(kind: str = "flux", names: tuple[str, ...] = ("content",), **fields: Any) -> Any:
    denoiser = tiny(kind)
    for seed, name in enumerate(names):
        add_adapter(denoiser, spec_for(kind, **fields), name)
        shake(denoiser, name, seed=seed)
    set_adapters(denoiser, dict.fromkeys(names, 1.0))
    return denoiser


def as_peft_does(denoiser: Any) -> Any:
    """A copy that computes as peft's classes do."""
    return made_stock(copy.deepcopy(denoiser))


def made_stock(denoiser: Any) -> Any:
    for module in denoiser.modules():
        if isinstance(module, LoraLayer):
            vars(module).pop("forward", None)
    return denoiser


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm()) <= tolerance * float(other.norm())


def gradients(denoiser: Any, given: Mapping[str, Tensor], name: str = "content") -> dict[str, Tensor]:
    parameters = trainable_parameters(denoiser, name)
    denoiser.zero_grad()
    run(denoiser, given).float().square().mean().backward()
    return {key: parameter.grad for key, parameter in parameters.items() if parameter.grad is not None}


def same_gradients(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-4) -> bool:
    return bool(one) and one.keys() == other.keys() and all(close(one[key], other[key], tolerance) for key in one)


def dense(layer: Any, weights: Mapping[str, float]) -> Tensor:
    """The layer's weight with adapters in it, in float64, from their stored factors."""
    total = layer.base_layer.weight.detach().double()
    for name, weight in weights.items():
        scale = weight * layer.lora_alpha[name] / layer.r[name]
        total = (
            total + scale * layer.lora_B[name].weight.detach().double() @ layer.lora_A[name].weight.detach().double()
        )
    return total


def layer_is_right(layer: Any, weights: Mapping[str, float], tolerance: float = 1e-6) -> bool:
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(7))
    expected = F.linear(x.double(), dense(layer, weights), layer.base_layer.bias.detach().double())
    with torch.no_grad():
        return close(layer(x), expected, tolerance)


class Products(TorchDispatchMode):
    """Counts matrix products, and the columns of those with a low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm")
        return func(*args, **(kwargs or {}))


def products(layer: Any) -> int:
    with Products() as counted, torch.no_grad():
        layer(torch.zeros(2, 5, layer.in_features))
    return counted.count


@pytest.mark.parametrize("fields", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_peft(kind: str, fields: dict[str, Any]) -> None:
    ours = adapted(kind, **fields)
    plain, given = as_peft_does(ours), inputs(kind)
    assert close(output(ours, given), output(plain, given))
    assert same_gradients(gradients(ours, given), gradients(plain, given))


def test_layers_stay_those_of_peft() -> None:
    for kind in KINDS:
        ours = adapted(kind)
        layers = [module for module in ours.modules() if isinstance(module, LoraLayer)]
        assert all(type(layer).__module__ == "peft.tuners.lora.layer" for layer in layers)
        assert all(("forward" in vars(layer)) != isinstance(layer, Conv2d) for layer in layers)
        assert all(not layer.lora_variant for layer in layers)
        assert list(ours.state_dict()) == list(as_peft_does(ours).state_dict())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the model's own norms, under autocast
@pytest.mark.parametrize("fields", SIDES.values(), ids=SIDES)
def test_under_bf16(fields: dict[str, Any]) -> None:
    """Base in bf16 and adapters in fp32, with autocast as in training and without; and an fp32 base under autocast."""
    wide, given = adapted("flux", **fields), inputs("flux")
    exact = output(wide, given)
    for denoiser, autocast in ((copy.deepcopy(wide).to(torch.bfloat16), False), (copy.deepcopy(wide), True)):
        for name, parameter in denoiser.named_parameters():
            parameter.data = parameter.data.float() if "lora_" in name else parameter.data
        plain = as_peft_does(denoiser)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, theirs = output(denoiser, given), output(plain, given)
            assert ours.dtype == theirs.dtype == torch.bfloat16
            assert close(ours, exact, 0.02)
            assert close(theirs, exact, 0.02)
            assert same_gradients(gradients(denoiser, given), gradients(plain, given), 0.1)


@pytest.mark.parametrize("fields", SIDES.values(), ids=SIDES)
def test_what_a_layer_keeps_for_the_backward_pass(fields: dict[str, Any]) -> None:
    ours = adapted("flux", **fields)
    numbers: dict[str, int] = {}
    for who, denoiser in (("ours", ours), ("peft", as_peft_does(ours))):
        layer = denoiser.get_submodule(LAYER)
        weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept, weights: set[int] = weights) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes() // 4
            return tensor

        x = torch.randn(2, 50, layer.in_features, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = layer(x)
        numbers[who] = sum(kept.values())
        assert loss.requires_grad
    tokens, width, rank = 100, 32, 6
    expected = {"output": tokens * width, "input": tokens * rank, "lora": tokens * (width + rank)}
    side = next(name for name, each in SIDES.items() if each is fields)
    assert numbers["ours"] == expected[side] <= numbers["peft"]


@pytest.mark.parametrize("fields", [SIDES["output"], SIDES["input"]], ids=["output", "input"])
def test_adapters_of_one_basis_cost_one_product(fields: dict[str, Any]) -> None:
    names = ("content", "style", "third")
    ours, weights = adapted("flux", names, **fields), {"content": 0.9, "style": 0.3, "third": -2.0}
    layer = ours.get_submodule(LAYER)
    ranks: list[int] = []
    for active in ({"content": 0.9}, weights):
        set_adapters(ours, active)
        assert layer_is_right(layer, active)
        ranks.append(products(layer))
    assert ranks == [3, 3]
    given = inputs("flux")
    assert close(output(ours, given), output(as_peft_does(ours), given))


def test_adapters_of_several_bases_add_up() -> None:
    ours = adapted("flux", ("content", "style"))
    add_adapter(ours, spec_for("flux", basis="random", rank=3), "other")
    add_adapter(ours, spec_for("flux", basis="lora", rank=2), "plain")
    shake(ours, "other")
    shake(ours, "plain")
    weights = {"content": 1.0, "other": 0.5, "style": -0.7, "plain": 2.0}
    set_adapters(ours, weights)
    layer, given = ours.get_submodule(LAYER), inputs("flux")
    assert layer_is_right(layer, weights)
    assert products(layer) == 3
    plain = as_peft_does(ours)
    assert same_gradients(gradients(ours, given, "other"), gradients(plain, given, "other"))
    assert same_gradients(gradients(ours, given, "plain"), gradients(plain, given, "plain"))


def test_one_adapter_is_trained_beside_a_frozen_one_of_its_basis() -> None:
    source = adapted("flux", ("style",))
    ours = adapted("flux")
    attach_adapter(ours, adapter_of(source, "style"), "style", weight=0.6)
    layer, given = ours.get_submodule(LAYER), inputs("flux")
    assert layer_is_right(layer, {"content": 1.0, "style": 0.6})
    assert products(layer) == 3
    assert same_gradients(gradients(ours, given), gradients(as_peft_does(ours), given))
    assert not trainable_parameters(ours, "style")


def test_weights_switches_removal_and_copies() -> None:
    ours = adapted("flux", ("content", "style"))
    layer, given = ours.get_submodule(LAYER), inputs("flux")
    base = output(tiny_flux(), given)
    for weights in ({"content": 1.0}, {"style": 0.5, "content": 2.0}, {"style": 1.0}, {"content": 0.0, "style": 1.5}):
        set_adapters(ours, weights)
        assert layer_is_right(layer, weights)
    with adapters_disabled(ours):
        assert torch.equal(output(ours, given), base)
    again = copy.deepcopy(ours)
    other: Any = again.get_submodule(LAYER)
    assert other.forward.__self__ is other
    other.lora_A["style"].weight.data.mul_(3)
    assert layer_is_right(other, weights)
    assert layer_is_right(layer, weights)
    remove_adapter(ours, "style")
    set_adapters(ours, {"content": 0.4})
    assert layer_is_right(layer, {"content": 0.4})
    add_adapter(ours, spec_for("flux", basis="random"), "style")
    shake(ours, "style")
    set_adapters(ours, weights)
    assert layer_is_right(layer, weights)


def test_fused_and_unfused() -> None:
    ours, given = adapted("flux", ("content", "style")), inputs("flux")
    expected = output(ours, given)
    ours.fuse_lora()
    assert close(output(ours, given), expected)
    ours.unfuse_lora()
    assert close(output(ours, given), expected)


def test_a_basis_that_is_written_to_is_compared_again(tmp_path: Path) -> None:
    """As a checkpoint's loader does it, and as diffusers' hotswap does it, which leaves no version behind."""
    other = tiny_flux()
    add_adapter(other, spec_for("flux", basis="random"), "style")
    shake(other, "style", seed=5)
    ours = adapted("flux", ("content", "style"))
    layer = ours.get_submodule(LAYER)
    both = {"content": 1.0, "style": 1.0}
    assert layer_is_right(layer, both)
    assert products(layer) == 3
    path = save_adapter(other, "style", tmp_path / "style.safetensors")
    ours.load_lora_adapter(str(path), prefix="transformer", adapter_name="style", hotswap=True)
    assert torch.equal(layer.lora_B["style"].weight, other.get_submodule(LAYER).lora_B["style"].weight)
    assert layer_is_right(layer, both)
    layer.lora_B["style"].load_state_dict(layer.lora_B["content"].state_dict())
    assert layer_is_right(layer, both)
    layer.lora_B["style"].load_state_dict({"weight": torch.randn(32, 6)})
    assert layer_is_right(layer, both)
    layer.lora_B["content"].weight = nn.Parameter(torch.randn(32, 6), requires_grad=False)
    assert layer_is_right(layer, both)


def test_beside_a_form_with_a_computation_of_its_own() -> None:
    ours = adapted("flux")
    add_adapter(ours, spec_for("flux", basis="dora"), "style")
    for parameter in trainable_parameters(ours, "style").values():
        parameter.data += 0.01
    for active in (("content",), ("style",), ("content", "style"), ("style", "content")):
        set_adapters(ours, dict.fromkeys(active, 0.8))
        given = inputs("flux")
        assert close(output(ours, given), output(as_peft_does(ours), given))


def test_beside_stock_adapters_with_dropout_or_bias() -> None:
    """They go with peft's own forward; without dropout in evaluation they are as plain as any."""
    ours = adapted("flux")
    targets = ["transformer_blocks.0.attn.to_q"]
    ours.add_adapter(LoraConfig(r=3, target_modules=targets, lora_dropout=0.5, init_lora_weights=False), "style")
    ours.set_adapter(["content", "style"])
    layer = ours.get_submodule(LAYER)
    x = torch.randn(2, 5, 32)
    for training in (True, False):
        outputs: list[Tensor] = []
        for denoiser in (ours, as_peft_does(ours)):
            denoiser.train(training)
            torch.manual_seed(0)
            outputs.append(denoiser.get_submodule(LAYER)(x))
        assert close(*outputs)
    assert layer_is_right(layer, {"content": 1.0, "style": 1.0})
    ours.add_adapter(LoraConfig(r=3, target_modules=targets, lora_bias=True, init_lora_weights=False), "biased")
    ours.set_adapter(["content", "biased"])
    assert close(layer(x), as_peft_does(ours).get_submodule(LAYER)(x))


def test_adapters_by_row_of_the_batch() -> None:
    ours = adapted("flux", ("content", "style"))
    plain, x, rows = as_peft_does(ours), torch.randn(3, 5, 32), ["style", "__base__", "content"]
    mixed, expected = (each.get_submodule(LAYER)(x, adapter_names=rows) for each in (ours, plain))
    assert torch.equal(mixed, expected)


@contextmanager
def doubling(module: nn.Module) -> Iterator[None]:
    hook = module.register_forward_hook(lambda _module, _inputs, output: output * 2)
    yield
    hook.remove()


def test_hooks_of_the_parts_of_a_layer_still_act() -> None:
    """Offloading and casting of other tools come as hooks on what is inside a layer."""
    ours = adapted("flux")
    layer: Any = ours.get_submodule(LAYER)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(7))
    base, both = layer.base_layer(x), layer(x)
    for part, expected in ((layer.base_layer, base + both), (layer.lora_A["content"], 2 * both - base)):
        with doubling(part):
            torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), both)


def test_a_trained_base_gets_its_gradients() -> None:
    ours = adapted("flux")
    for denoiser in (ours, plain := as_peft_does(ours)):
        denoiser.get_submodule(LAYER).base_layer.requires_grad_(True)
    given = inputs("flux")
    assert same_gradients(gradients(ours, given), gradients(plain, given))
    for key in ("weight", "bias"):
        one, other = (getattr(each.get_submodule(LAYER).base_layer, key).grad for each in (ours, plain))
        assert close(one, other, 1e-4)
