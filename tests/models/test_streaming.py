"""Blocks that stay on the CPU: the same numbers, trained coefficients untouched, nothing left behind.

There is no second device here, so "device" is the CPU as well: weights are still copied in and out, and what is not
held is poisoned. tests/gpu has the same on CUDA, with the memory measured.
"""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from qrlora.adapter import AdapterSpec, add_adapter, remove_adapter, trainable_parameters
from qrlora.errors import QrloraError
from qrlora.models import BlockStream, load_pipeline, repeated_blocks
from tests.tiny_models import inputs, output, run, tiny

CPU = torch.device("cpu")
KINDS = ["flux", "sd3", "unet"]


def gradients(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    parameters = trainable_parameters(model, "content")
    run(model, inputs(kind)).square().mean().backward()
    found = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad, None
    return found


def adapted(kind: str) -> Any:
    model = tiny(kind)
    model.requires_grad_(False)
    add_adapter(model, AdapterSpec(rank=4), "content")
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model, "content").values():
        parameter.data += torch.randn(parameter.shape, generator=generator).triu() * 0.1
    return model


def poison(stream: BlockStream) -> None:
    """What stands in the rooms of the device between two uses."""
    for slot in stream._slots:
        slot.storage.fill_(255)  # nan as floating point
        if slot.block is not None:
            slot.block.slot = None
        slot.block = None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_whole_model(kind: str, dtype: torch.dtype) -> None:
    expected, model = adapted(kind), adapted(kind)
    plain = [expected, model]
    if dtype == torch.bfloat16:
        for each in plain:
            for name, parameter in each.named_parameters():
                if "lora_" not in name:
                    parameter.data = parameter.data.bfloat16()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    parameters = trainable_parameters(model, "content")
    stream = BlockStream(model, CPU)
    assert trainable_parameters(model, "content") == parameters  # the same objects
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert torch.equal(output(model, inputs(kind)), output(expected, inputs(kind)))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found, wanted = gradients(model, kind), gradients(expected, kind)
        assert found.keys() == wanted.keys()
        for name in found:
            assert torch.equal(found[name], wanted[name]), name
        poison(stream)
    stream.remove()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert torch.equal(output(model, inputs(kind)), output(expected, inputs(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_only_two_blocks_are_on_the_device_and_adapters_stay(kind: str) -> None:
    model = adapted(kind)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    stream = BlockStream(model, CPU)
    blocks = repeated_blocks(model)
    sizes = [
        sum(p.numel() * p.element_size() for name, p in block.named_parameters() if "lora_" not in name)
        for block in blocks.values()
    ]
    assert sum(sizes) <= stream.host_bytes <= sum(sizes) * 1.5 + 256 * 100 * len(sizes)
    assert max(sizes) * 2 <= stream.device_bytes <= stream.host_bytes + 2 * stream.device_bytes // 2
    hosts = {block.host.untyped_storage().data_ptr() for block in stream._blocks}
    rooms = {slot.storage.untyped_storage().data_ptr() for slot in stream._slots}
    for name, parameter in model.named_parameters():
        where = parameter.untyped_storage().data_ptr()
        inside = any(name.startswith(f"{block}.") for block in blocks) and "lora_" not in name
        assert (where in hosts) == inside, name
        assert where not in rooms
        assert id(parameter) == before[name]


def test_while_a_block_computes_its_weights_are_in_a_room_and_no_others_are() -> None:
    model = adapted("flux")
    stream = BlockStream(model, CPU)
    rooms = {slot.storage.untyped_storage().data_ptr() for slot in stream._slots}
    seen = []

    def held() -> list[nn.Module]:
        weights = [block.module.attn.to_q.base_layer.weight for block in stream._blocks]
        return [
            block.module
            for block, weight in zip(stream._blocks, weights, strict=True)
            if weight.untyped_storage().data_ptr() in rooms
        ]

    for block in stream._blocks:
        block.module.attn.register_forward_hook(lambda *_, module=block.module: seen.append(held() == [module]))
    run(model, inputs("flux")).sum().backward()
    assert seen == [True] * 2 * len(stream._blocks)
    assert held() == []


def test_the_mask_of_coefficients_holds_through_it() -> None:
    model = tiny("flux")
    model.requires_grad_(False)
    add_adapter(model, AdapterSpec(rank=4, mask="upper"), "content")
    BlockStream(model, CPU)
    for name, gradient in gradients(model, "flux").items():
        assert torch.equal(gradient, gradient.triu()), name


@pytest.mark.parametrize("kind", KINDS)
def test_with_checkpointing_streamed_blocks_are_computed_twice_not_thrice(kind: str) -> None:
    model, counts = adapted(kind), []
    loaded_stream = BlockStream(model, CPU)
    model.enable_gradient_checkpointing()
    loaded_stream.take_over_checkpointing()
    model.train()
    for block in loaded_stream._blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner, **kwargs: (counts.append(1), inner(*args, **kwargs))[1]
    expected = gradients(adapted(kind), kind)
    found = gradients(model, kind)
    assert len(counts) == 2 * len(loaded_stream._blocks)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_adapters_added_later_and_taken_off_again() -> None:
    expected, model = tiny("flux"), tiny("flux")
    for each in (expected, model):
        each.requires_grad_(False)
    stream = BlockStream(model, CPU)
    for each in (expected, model):
        add_adapter(each, AdapterSpec(rank=4), "content")
    stream.settle()
    found, wanted = gradients(model, "flux"), gradients(expected, "flux")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    remove_adapter(model, "content")
    assert torch.equal(output(model, inputs("flux")), output(expected, inputs("flux")))  # coefficients are still zero


def test_text_encoders_stream_too(tiny_flux: Any) -> None:
    whole = load_pipeline(tiny_flux)
    streamed = load_pipeline(tiny_flux, encoder_offload="blocks")
    assert repeated_blocks(streamed.pipeline.text_encoder_2)
    wanted = whole.family.encode_prompts(whole.pipeline, ["a cat", "a dog"], 16)
    found = streamed.family.encode_prompts(streamed.pipeline, ["a cat", "a dog"], 16)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_streamed_encoder_is_freed_at_once(tiny_flux: Any) -> None:
    model = load_pipeline(tiny_flux, encoder_offload="blocks")
    model.family.encode_prompts(model.pipeline, ["a cat"], 16)
    blocks = [weakref.ref(block) for block in repeated_blocks(model.pipeline.text_encoder_2).values()]
    assert blocks
    gc.collect()
    gc.disable()
    try:
        model.release_encoders()
        assert all(block() is None for block in blocks)
    finally:
        gc.enable()


def test_what_cannot_be_streamed_is_said() -> None:
    with pytest.raises(QrloraError, match="names no repeated blocks"):
        BlockStream(nn.Linear(2, 2), CPU)
    with pytest.raises(QrloraError, match=r"transformer_blocks\.0\..* is trained, so it cannot be streamed"):
        BlockStream(tiny("flux"), CPU)
