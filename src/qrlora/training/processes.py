"""Several processes of one launch: joining them, adding their gradients up, and noticing when one of them is gone."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from qrlora.errors import QrloraError, tell

# One process may draw pictures or write files for long while the others wait; whether it lives is told by its beats.
_PATIENCE_OF_COLLECTIVES = timedelta(hours=12)
BEAT, SILENCE, GRACE = 0.5, 90.0, 5.0
"""Seconds: between two signs of life, after how many without one a process of another machine counts as gone, and for
how many the main thread may still say so itself."""
_runs = itertools.count()


def join_launch(device: str | None) -> Accelerator:
    """This process, together with the others that `accelerate launch` or `torchrun` started.

    Args:
        device: `config.device`.

    Raises:
        QrloraError: a launch of several that would train as many times over, or in a way that is not known here.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    on_cpu = launched > 1 and (device == "cpu" or not torch.accelerator.is_available())
    patience = InitProcessGroupKwargs(timeout=_PATIENCE_OF_COLLECTIVES)
    accelerator = Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=[patience])
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise QrloraError(
            f"{kind.value} is not known here; launch data parallel (--multi_gpu) or sharded (--use_fsdp "
            "--fsdp_version 2)."
        )
    if accelerator.num_processes != launched:
        raise QrloraError(
            f"{launched} processes were launched, but each sees {accelerator.num_processes} only, and would train "
            "alone; add --device cpu to train on the CPU, or launch one process."
        )
    return accelerator


def leave_launch() -> bool:
    """End what `join_launch` began, once this process has nothing more to train.

    Returns:
        Whether this process speaks for all.
    """
    state = PartialState()
    main = state.is_main_process
    if state.num_processes > 1:
        state.destroy_process_group()
    return main


def asks_for_sharding(accelerator: Accelerator) -> bool:
    """Whether the launch says FSDP, and has anything to share.

    Raises:
        QrloraError: its first version.
    """
    if accelerator.num_processes == 1 or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise QrloraError(
            "only the second version of FSDP shards a base and leaves adapters whole; launch with --fsdp_version 2."
        )
    return True


def add_up(accelerator: Accelerator, parameters: Iterable[nn.Parameter], number: Tensor) -> Tensor:
    """Replace gradients by their mean over the processes, and return the mean of `number`, all in one exchange.

    Coefficients are few beside the base, so nothing is gained by sending them while others are still computed.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*(gradient.flatten().float() for gradient in gradients), number.float().reshape(1)])
    mean: Any = accelerator.reduce(flat, reduction="mean")
    at = 0
    for gradient in gradients:
        gradient.copy_(mean[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
    return mean[at]


@contextmanager
def watching(accelerator: Accelerator, kept: Callable[[], str]) -> Iterator[None]:
    """Within, a process that ends without a word ends the others with a sentence, instead of letting them wait.

    Args:
        accelerator: of the launch; nothing happens where there is one process.
        kept: says what is not lost.

    Raises:
        QrloraError: another process is gone. A process that cannot say so, since it waits within a library for the one
            that is gone, prints the sentence and exits with 2.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch = _Watch(accelerator.process_index, accelerator.num_processes, kept)
    try:
        yield
    except RuntimeError as error:  # what the libraries raise where a connection broke, and much else
        watch.told_by_main = True
        sentence = watch.sentence(within=2 * GRACE)
        if sentence is None:
            raise
        raise QrloraError(sentence) from error
    finally:
        watch.stop()


class _Watch:
    """Signs of life of all processes in the store of their launch: each counts, and all look at all counts.

    Those of one machine are looked for themselves too, which tells at once.
    """

    def __init__(self, process: int, processes: int, kept: Callable[[], str]) -> None:
        self.told_by_main = False
        self._process, self._processes, self._kept = process, processes, kept
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        self._store = store.clone()  # for a thread of its own
        self._key = f"qrlora/{next(_runs)}"
        self._counts = [0] * processes
        self._seen = [time.monotonic()] * processes
        self._near: dict[int, psutil.Process] = {}
        self._unreachable = False
        own = psutil.Process()
        self._store.set(f"{self._key}/{process}/who", f"{own.pid} {own.create_time()}")
        self._beat()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="qrlora-watch")
        self._thread.start()

    def stop(self) -> None:
        """No more signs of life of this process."""
        self._stopped.set()
        self._thread.join(timeout=GRACE)

    def sentence(self, within: float) -> str | None:
        """That a process is gone, where one is not there or gives no sign of life for `within` seconds from now."""
        before, end = list(self._counts), time.monotonic() + within
        while time.monotonic() < end and not self._unreachable:
            if ended := [i for i in self._others() if self._has_ended(i)]:
                return self._told(f"process {ended[0]}")
            time.sleep(BEAT / 2)
        if self._unreachable:
            return self._told("the process that started them or process 0")
        silent = [i for i in self._others() if self._counts[i] == before[i]]
        return self._told(f"process {silent[0]}") if silent else None

    def _told(self, who: str) -> str:
        return (
            f"{who} of {self._processes} is gone (killed, out of memory, or ended by an error that it told), so this "
            f"training stops; {self._kept()}"
        )

    def _others(self) -> list[int]:
        return [i for i in range(self._processes) if i != self._process]

    def _run(self) -> None:
        while not self._stopped.wait(BEAT):
            self._beat()
            gone = [i for i in self._others() if self._is_silent(i) or self._has_ended(i)]
            if gone or self._unreachable:
                self._end(f"process {gone[0]}" if gone else "the process that started them or process 0")
                return

    def _beat(self) -> None:
        try:
            for i in range(self._processes):
                count = self._store.add(f"{self._key}/{i}", int(i == self._process))
                if self._counts[i] == 0 and count > 0 and i != self._process:
                    self._look_for(i)
                if count != self._counts[i]:
                    self._counts[i], self._seen[i] = count, time.monotonic()
        except RuntimeError:  # of torch.distributed: the store was with a process that is gone
            self._unreachable = True

    def _look_for(self, i: int) -> None:
        """Find a process on this machine, by its number and the moment it was started."""
        number, started = self._store.get(f"{self._key}/{i}/who").decode().split()
        with suppress(psutil.Error):  # it is on another machine, where its number means another process or none
            found = psutil.Process(int(number))
            if found.create_time() == float(started):
                self._near[i] = found

    def _is_silent(self, i: int) -> bool:
        """One that never gave a sign may still be loading its model."""
        return self._counts[i] > 0 and time.monotonic() - self._seen[i] > SILENCE

    def _has_ended(self, i: int) -> bool:
        try:
            return i in self._near and self._near[i].status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def _end(self, who: str) -> None:
        """The main thread may be waiting in a library that never returns."""
        if self._stopped.wait(GRACE) or self.told_by_main:
            return
        tell(f"qrlora: {self._told(who)}")
        os._exit(2)
