"""Bases of many layers side by side: in order, on one thread each, and the same bits however many threads there are."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qrlora.adapter import AdapterSpec, BasisCache, adapter_of, add_adapter
from qrlora.adapter._parallel import by_layer
from qrlora.errors import QrloraError
from tests.tiny_models import tiny_flux


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_in_order_side_by_side_and_on_one_thread_each(threads: None) -> None:
    meeting = threading.Barrier(3, timeout=10)

    def make(layer: str) -> tuple[str, int]:
        meeting.wait()
        return layer, torch.get_num_threads()

    layers = [f"layer {index}" for index in range(9)]
    assert list(by_layer(make, layers)) == [(layer, 1) for layer in layers]
    assert torch.get_num_threads() == 3
    here = threading.get_ident()
    assert list(by_layer(lambda _: threading.get_ident(), layers, at_once=1)) == [here] * 9
    assert list(by_layer(make, [])) == []


def test_what_goes_wrong_comes_out_and_the_threads_are_put_back(threads: None) -> None:
    def make(layer: str) -> str:
        raise QrloraError(f"{layer} is broken.")

    with pytest.raises(QrloraError, match="one is broken"):
        list(by_layer(make, ["one", "two"]))
    assert torch.get_num_threads() == 3


def test_bases_have_the_same_bits_on_any_number_of_threads(threads: None, tmp_path: Path) -> None:
    # Wide enough for products that several threads would share, and for the Krylov solver.
    found: list[list[torch.Tensor]] = []
    for count in (3, 2):
        torch.set_num_threads(count)
        BasisCache.forget()
        denoiser = tiny_flux()
        generator = torch.Generator().manual_seed(0)
        layer = denoiser.transformer_blocks[0].ff.net[2]
        left, right = (torch.linalg.qr(torch.randn(600, 600, generator=generator))[0] for _ in range(2))
        torch.set_num_threads(1)  # the weight itself
        weight = (left * torch.arange(1, 601) ** -0.5) @ right
        torch.set_num_threads(count)
        denoiser.transformer_blocks[0].ff.net[2] = torch.nn.Linear(600, 600)
        denoiser.transformer_blocks[0].ff.net[2].weight.data = weight
        del layer
        spec = AdapterSpec(rank=8, target_modules=["transformer_blocks.0.ff.net.2"])
        add_adapter(denoiser, spec, "content", cache=BasisCache(tmp_path / str(count)))
        found.append([pair.B for pair in adapter_of(denoiser, "content").layers.values()])
    BasisCache.forget()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_progress_counts_up(tmp_path: Path, threads: None) -> None:
    seen: list[tuple[int, int]] = []
    layers = add_adapter(
        tiny_flux(),
        AdapterSpec(rank=2),
        "content",
        cache=BasisCache(tmp_path),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, len(layers)) for done in range(1, len(layers) + 1)]
