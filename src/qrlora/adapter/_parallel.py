"""Work on many layers at once, on a CPU."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Made = TypeVar("Made")


def by_layer(make: Callable[[str], Made], layers: Sequence[str], *, at_once: int | None = None) -> Iterator[Made]:
    """`make` of every layer, in their order, as many at once as torch has threads; each of them on a single one.

    Small decompositions hardly gain from threads within, so layers side by side are faster; and what is computed on one
    thread has the same bits however many there are.

    Args:
        make: called with a layer's name, from any thread.
        layers: their names.
        at_once: how many; as many as torch has threads where None. 1 is for work on another device: one after the
            other, in the caller's thread.
    """
    threads = torch.get_num_threads()
    if at_once == 1 or threads == 1 or not layers:
        yield from map(make, layers)
        return
    workers = min(at_once or threads, len(layers))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(make, layers)
    finally:
        torch.set_num_threads(threads)
