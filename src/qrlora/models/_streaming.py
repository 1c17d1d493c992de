"""Frozen blocks that stay in the CPU's memory, each on the device only while it computes.

diffusers' group offloading moves every parameter of a group and takes it away when the group's forward pass ends. That
fits making pictures. In training it would carry the trained coefficients along (with streams, from copies made before
the first step), and take frozen weights away that the backward pass still needs. So this moves frozen base weights
alone, and a block that is to be differentiated is computed again in the backward pass, as in gradient checkpointing,
with its weights held until its own gradients are there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from qrlora.errors import QrloraError

_ALIGNMENT = 256
_QUANT_STATE = ("absmax", "code", "offset")
"""Tensors of a bitsandbytes quantisation state; `state2` holds those of the state's own quantisation."""


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that make up most of a model, by path: members of a `ModuleList` of the classes that the model names.

    diffusers names them in `_repeated_blocks` or, like transformers, in `_no_split_modules`.
    """
    known = getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ()
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in known and name.rpartition(".")[0] in lists
    }


@dataclass
class _Piece:
    """One tensor of a block: where it is held, and where it lies in the block's bytes."""

    owner: Any
    attribute: str
    shape: torch.Size
    dtype: torch.dtype
    start: int

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def put(self, storage: Tensor) -> None:
        piece = storage[self.start : self.start + self.size].view(self.dtype).view(self.shape)
        setattr(self.owner, self.attribute, piece)


@dataclass
class _Block:
    module: nn.Module
    forward: Callable[..., Any]
    pieces: list[_Piece]
    host: Tensor
    slot: "_Slot | None" = None
    later: "_Block | None" = None
    """Which one came after it in the forward pass, learned by watching; guessed wrong, it costs time alone."""
    earlier: "_Block | None" = None


@dataclass
class _Slot:
    """Room for one block on the device."""

    storage: Tensor
    block: _Block | None = None
    ready: Any = None
    """CUDA event: the block is there."""
    free: Any = None
    """CUDA event: whoever used the room is done with it."""


@dataclass
class BlockStream:
    """The repeated blocks of a model, computing on `device` with their base weights kept on the CPU.

    Two blocks have room on the device: the one that computes and the one that is fetched meanwhile. Everything else of
    the model moves to `device`, adapters included; `settle` moves what was added later. Parameters stay the objects
    they are. Numbers do not depend on it: what is computed is the same.

    Args:
        model: a denoiser or a text encoder, on the CPU.
        device: where it is to compute.

    Raises:
        QrloraError: a model without repeated blocks, or one with trained base weights in them.
    """

    model: nn.Module
    device: torch.device
    _blocks: list[_Block] = field(default_factory=list[_Block], init=False)
    _slots: list[_Slot] = field(default_factory=list[_Slot], init=False)
    _copies: Any = field(default=None, init=False)
    _last: _Block | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        found = repeated_blocks(self.model)
        if not found:
            raise QrloraError(
                f"{type(self.model).__name__} names no repeated blocks, so it cannot be streamed; set offload: none."
            )
        on_cuda = self.device.type == "cuda"
        for name, module in found.items():
            self._blocks.append(_packed(module, name, pinned=on_cuda))
        room = max(len(block.host) for block in self._blocks)
        self._slots = [_Slot(torch.empty(room, dtype=torch.uint8, device=self.device)) for _ in range(2)]
        if on_cuda:
            self._copies = torch.cuda.Stream(self.device)
            for slot in self._slots:
                slot.free = torch.cuda.current_stream(self.device).record_event()
        for block in self._blocks:
            block.module.forward = self._streamed(block)
        self.settle()

    @property
    def device_bytes(self) -> int:
        """What the rooms take on the device."""
        return sum(len(slot.storage) for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        """What the blocks take on the CPU."""
        return sum(len(block.host) for block in self._blocks)

    @property
    def host_tensors(self) -> list[Tensor]:
        """The bytes of each block on the CPU."""
        return [block.host for block in self._blocks]

    @property
    def device_tensors(self) -> list[Tensor]:
        """The rooms on the device."""
        return [slot.storage for slot in self._slots]

    def settle(self) -> None:
        """Move everything that is not streamed to the device: what stands outside the blocks, and adapters in them."""
        pieces = {(id(piece.owner), piece.attribute) for block in self._blocks for piece in block.pieces}
        owners = {owner for owner, _ in pieces}
        for module in self.model.modules():
            for parameter in cast(Any, module)._parameters.values():
                if parameter is not None and id(parameter) not in owners:
                    parameter.data = parameter.data.to(self.device)
                    if parameter.grad is not None:
                        parameter.grad = parameter.grad.to(self.device)
            for key, buffer in list(cast(Any, module)._buffers.items()):
                if buffer is not None and (id(module), key) not in pieces:
                    module._buffers[key] = buffer.to(self.device)

    def take_over_checkpointing(self) -> None:
        """Switch diffusers' checkpointing off where it would compute streamed blocks a third time."""
        blocks = {id(block.module) for block in self._blocks}
        for module in self.model.modules():
            if not getattr(module, "gradient_checkpointing", False):
                continue
            for child in module.children():
                if isinstance(child, nn.ModuleList) and any(id(member) in blocks for member in child):
                    cast(Any, module).gradient_checkpointing = False

    def remove(self) -> None:
        """Leave the model whole on the CPU in the blocks and on the device elsewhere, as if never streamed."""
        if self._copies is not None:
            self._copies.synchronize()  # one may still be under way
        for block in self._blocks:
            self._release(block)
            if getattr(block.forward, "__func__", None) is type(block.module).forward:
                del block.module.forward  # no cycle stays that would keep the weights
            else:
                block.module.forward = block.forward
            block.slot = block.later = block.earlier = None
        self._last = None
        self._slots.clear()

    def _streamed(self, block: _Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            if not torch.is_grad_enabled():
                with self._held(block, backward=False):
                    return block.forward(*args, **kwargs)
            call = _Call(self, block, leaves, spec)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            outputs: Any = _Recomputed.apply(call, *tensors, *call.trained)
            assert call.output_spec is not None
            return tree_unflatten(list(outputs), call.output_spec)

        return forward

    def _held(self, block: _Block, *, backward: bool) -> "_Held":
        return _Held(self, block, backward)

    def _acquire(self, block: _Block, *, backward: bool) -> None:
        if not backward and self._last is not None and self._last is not block:
            self._last.later, block.earlier = block, self._last
        self._last = None if backward else block
        slot = block.slot or self._fetch(block, busy=None)
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        for piece in block.pieces:
            piece.put(slot.storage)
        coming = block.earlier if backward else block.later
        if coming is not None and coming.slot is None:
            self._fetch(coming, busy=slot)

    def _fetch(self, block: _Block, busy: _Slot | None) -> _Slot:
        """Copy a block into the room that is not `busy`, beside what is being computed."""
        slot = next(slot for slot in self._slots if slot is not busy)
        if slot.block is not None:
            slot.block.slot = None
        slot.block, block.slot = block, slot
        if self._copies is None:
            slot.storage[: len(block.host)].copy_(block.host)
            return slot
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.free)
            slot.storage[: len(block.host)].copy_(block.host, non_blocking=True)
            slot.storage.record_stream(self._copies)
            slot.ready = self._copies.record_event()
        return slot

    def _release(self, block: _Block) -> None:
        for piece in block.pieces:
            piece.put(block.host)
        if block.slot is not None and self._copies is not None:
            block.slot.free = torch.cuda.current_stream(self.device).record_event()


class _Held:
    """Within, a block's weights are on the device."""

    def __init__(self, stream: BlockStream, block: _Block, backward: bool) -> None:
        self._stream, self._block, self._backward = stream, block, backward

    def __enter__(self) -> None:
        self._stream._acquire(self._block, backward=self._backward)

    def __exit__(self, *_: object) -> None:
        self._stream._release(self._block)


class _Call:
    """One call of a block: its arguments apart from their tensors, and the autocast it was made under."""

    def __init__(self, stream: BlockStream, block: _Block, leaves: list[Any], spec: TreeSpec) -> None:
        self.stream, self.block, self.spec = stream, block, spec
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.trained = [parameter for parameter in block.module.parameters() if parameter.requires_grad]
        kind = stream.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.output_spec: TreeSpec | None = None

    def run(self, tensors: list[Tensor]) -> list[Any]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        outputs, self.output_spec = tree_flatten(self.block.forward(*args, **kwargs))
        return outputs


class _Recomputed(torch.autograd.Function):
    """A block without saved activations: its backward pass computes it again, weights held until all gradients are.

    Like `torch.utils.checkpoint` with `use_reentrant=True`, but trained coefficients are inputs, so gradients reach
    them through the graph also where no input of the block needs one.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Any, ...]:
        inputs = list(tensors[: len(call.places)])
        ctx.call = call
        ctx.save_for_backward(*inputs)
        with call.stream._held(call.block, backward=False):
            return tuple(call.run(inputs))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        call: _Call = ctx.call
        wanted = ctx.needs_input_grad[1:]
        inputs = [tensor.detach() for tensor in ctx.saved_tensors]
        for tensor, needed in zip(inputs, wanted, strict=False):
            tensor.requires_grad_(needed)
        kind, dtype, enabled = call.autocast
        with call.stream._held(call.block, backward=True):
            with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                outputs = call.run(inputs)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None and isinstance(output, Tensor) and output.requires_grad
            ]
            needing = [tensor for tensor, needed in zip([*inputs, *call.trained], wanted, strict=True) if needed]
            found = torch.autograd.grad(
                [output for output, _ in pairs], needing, [gradient for _, gradient in pairs], allow_unused=True
            )
        rest = iter(found)
        return None, *(next(rest) if needed else None for needed in wanted)


def _packed(module: nn.Module, name: str, *, pinned: bool) -> _Block:
    """A block with its frozen base tensors gathered in one stretch of CPU memory."""
    pieces: list[_Piece] = []
    sources: list[Tensor] = []
    start = 0
    for owner, attribute in _frozen_tensors(module, name):
        tensor = getattr(owner, attribute)
        pieces.append(_Piece(owner, attribute, tensor.shape, tensor.dtype, start))
        sources.append(tensor)
        start += -(-pieces[-1].size // _ALIGNMENT) * _ALIGNMENT
    host = torch.empty(start, dtype=torch.uint8, pin_memory=pinned)
    for piece, source in zip(pieces, sources, strict=True):
        host[piece.start : piece.start + piece.size].view(piece.dtype).view(piece.shape).copy_(source)
        piece.put(host)
    return _Block(module, module.forward, pieces, host)


def _frozen_tensors(block: nn.Module, name: str) -> Iterator[tuple[Any, str]]:
    """Owner and attribute of every base tensor of a block, looking into packed weights; adapters are left out."""
    for path, module in block.named_modules():
        if "lora_" in path:
            continue
        for key, parameter in cast(Any, module)._parameters.items():
            if parameter is None:
                continue
            if parameter.requires_grad:
                raise QrloraError(f"{name}.{path}.{key} is trained, so it cannot be streamed; set offload: none.")
            yield from _tensors_of(parameter)
        for key, buffer in cast(Any, module)._buffers.items():
            if buffer is not None:
                yield module, key


def _tensors_of(parameter: Any) -> Iterator[tuple[Any, str]]:
    if type(parameter) is not nn.Parameter and hasattr(parameter, "__tensor_flatten__"):
        for attribute in parameter.__tensor_flatten__()[0]:  # torchao
            yield parameter, attribute
        return
    yield parameter, "data"
    state = getattr(parameter, "quant_state", None)
    while state is not None:  # bitsandbytes
        for attribute in _QUANT_STATE:
            if isinstance(getattr(state, attribute, None), Tensor):
                yield state, attribute
        state = getattr(state, "state2", None)
