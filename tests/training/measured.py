"""The memory that a training step really takes on the CPU, by the events of PyTorch's allocator."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from qrlora.training import loop
from qrlora.training.run import Run


def resident_bytes(run: Run) -> int:
    """Base weights with what is packed into them, adapter, optimiser states: everything that outlives a step."""
    found: dict[int, int] = {}

    def count(tensor: Any) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                count(getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            for value in (state.absmax, state.code):
                count(value)
            state = state.state2

    denoiser = run.model.denoiser
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        count(tensor)
    for state in run.optimiser.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                count(value)
    for stream in run.model._streams.values():
        for tensor in stream.device_tensors:
            count(tensor)
        for tensor in stream.host_tensors:  # in this test, "device" and host are one
            found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())


def peak_bytes(events: Any) -> int:
    """The most that was allocated at once since the profile began."""
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, change in memory:
        now += change
        peak = max(peak, now)
    return peak


@contextmanager
def measured_step(monkeypatch: Any, step: int = 1) -> Iterator[list[int]]:
    """Within, the training step after `step` others is measured: one entry, bytes at its peak."""
    peaks: list[int] = []
    original = Run.train_step

    def train_step(self: Run) -> None:
        if self.step != step:
            return original(self)
        before = resident_bytes(self)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            original(self)
        results: Any = measured.profiler
        peaks.append(before + peak_bytes(results.kineto_results.events()))
        return None

    monkeypatch.setattr(Run, "train_step", train_step)
    try:
        yield peaks
    finally:
        monkeypatch.setattr(Run, "train_step", original)


@contextmanager
def measured_encoding(monkeypatch: Any) -> Iterator[list[int]]:
    """Within, the encoding of pictures and captions is measured, with the encoders on the device."""
    peaks: list[int] = []
    original = loop.encode

    def encode(config: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        model.place_encoders("cpu")
        family, found, host = model.family, dict[int, int](), set[int]()
        for stream in model._streams.values():
            host |= {tensor.untyped_storage().data_ptr() for tensor in stream.host_tensors}
            for tensor in stream.device_tensors:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        for name in (*family.text_components, *family.picture_components):
            module = getattr(model.pipeline, name)
            for tensor in (*module.parameters(), *module.buffers()):
                if (where := tensor.untyped_storage().data_ptr()) not in host:
                    found[where] = tensor.untyped_storage().nbytes()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            result = original(config, model, *args, **kwargs)
        results: Any = measured.profiler
        peaks.append(sum(found.values()) + peak_bytes(results.kineto_results.events()))
        return result

    monkeypatch.setattr(loop, "encode", encode)
    try:
        yield peaks
    finally:
        monkeypatch.setattr(loop, "encode", original)
