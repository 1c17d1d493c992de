"""A run under way: its steps, and what happens between them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from qrlora.adapter import adapter_of_pipeline, kept_tensors
from qrlora.data import Encoded
from qrlora.errors import QrloraError
from qrlora.models import LoadedModel, NoiseProcess
from qrlora.training.checkpoint import CURVES, KEPT, prune_checkpoints, save_checkpoint
from qrlora.training.config import TrainConfig
from qrlora.training.ema import EMA, MovingAverage
from qrlora.training.folder import forget
from qrlora.training.interrupt import Interrupted, StopRequest
from qrlora.training.objective import Draw, loss_of
from qrlora.training.optimiser import learning_rates, optimiser_tensors, set_rates
from qrlora.training.processes import add_up
from qrlora.training.progress import ProgressReport
from qrlora.training.setup import ADAPTER_NAME, Place
from qrlora.training.split import Split
from qrlora.training.trackers import Trackers
from qrlora.training.validation import Validation
from qrlora.training.words import Words

OnStep = Callable[[int, int], None]


@dataclass
class Run:
    """Everything a step needs."""

    config: TrainConfig
    model: LoadedModel
    accelerator: Accelerator
    place: Place
    output: Path
    encoded: Encoded
    prior: Encoded | None
    """Class pictures, where the prior is preserved."""
    process: NoiseProcess
    split: Split
    parameters: dict[str, nn.Parameter]
    words: Words | None
    """The text encoders, where they are trained too."""
    optimiser: torch.optim.Optimizer
    average: MovingAverage | None
    """Of the coefficients: what files and validation pictures are made of, where there is one."""
    record: dict[str, Any]
    about: dict[str, Any]
    curves: Tensor
    """Loss and gradient norm by step `[2, max_train_steps]`, on the device: reading them would stall it."""
    validation: Validation | None
    trackers: Trackers
    step: int = 0
    checked: int = 0
    last_good: Path | None = None
    outdated: list[Path] = field(default_factory=list[Path])
    """What this run replaces, removed once there is something newer."""
    rates: Callable[[int], float] = field(init=False)

    def __post_init__(self) -> None:
        self.rates = learning_rates(self.config)

    def autocast(self) -> torch.autocast:
        """bf16 arithmetic where it was asked for; the coefficients stay fp32 and are cast as they are used."""
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.place.autocast)

    @contextmanager
    def casting(self) -> Iterator[None]:
        """Under autocast, cast coefficients (small) to bf16; peft left alone casts activations (large) to fp32."""
        adapted = [self.model.denoiser, *(self.words.encoders if self.words is not None else ())]
        with ExitStack() as stack:
            for module in adapted:
                stack.enter_context(disable_input_dtype_casting(module, active=self.place.autocast))
            yield

    def train_step(self) -> None:
        """One optimiser step, without waiting for the device (Prodigy waits by itself)."""
        config, accumulation = self.config, self.config.gradient_accumulation_steps
        total = torch.zeros((), device=self.place.device)
        parts = ("instance",) if self.prior is None else ("instance", "class")
        for micro, part in product(range(accumulation), parts):
            with self.autocast():
                loss = self._loss(micro) if part == "instance" else self._prior_loss(micro)
            (loss / accumulation).backward()
            total += loss.detach()
        mean = total / accumulation
        if self.place.processes > 1:
            mean = add_up(self.accelerator, self.parameters.values(), mean)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        set_rates(config, self.optimiser, self.rates(self.step))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.curves[0, self.step] = mean
        self.curves[1, self.step] = norm
        self.step += 1

    def _loss(self, micro: int) -> Tensor:
        drawn = self.split.draw(self.encoded, self.process, self.step, micro)
        return self._loss_of(self.encoded, drawn)

    def _prior_loss(self, micro: int) -> Tensor:
        """Of class pictures, weighted; one more pass of a batch costs no more memory, where a batch of both would."""
        assert self.prior is not None
        drawn = self.split.draw(self.prior, self.process, self.step, micro, of_class=True)
        return self.config.prior_loss_weight * self._loss_of(self.prior, drawn)

    def _loss_of(self, encoded: Encoded, drawn: Draw) -> Tensor:
        family, guidance, device = self.model.family, self.config.guidance_scale, self.place.device
        if self.words is not None:
            encoded, drawn = self.words.read(encoded, drawn)
        return loss_of(family, self.model.denoiser, encoded, drawn, self.process, guidance, device)

    def shown(self) -> AbstractContextManager[None]:
        """Within, the coefficients are what files and pictures are made of."""
        return nullcontext() if self.average is None else self.average.shown()

    def check_finite(self) -> None:
        """Raise before anything that is not finite reaches a file."""
        recent = self.curves[:, self.checked : self.step]
        if not bool(torch.isfinite(recent).all()):
            bad = self.checked + int((~torch.isfinite(recent).all(dim=0)).nonzero()[0])
            kept = (
                f"the last good checkpoint is {self.last_good}" if self.last_good else "no checkpoint was written yet"
            )
            raise QrloraError(
                f"the loss or its gradient was not finite at step {bad}, so the run was stopped; {kept}. Try a lower "
                f"learning_rate (it is {self.config.learning_rate}), some lr_warmup_steps, or mixed_precision: no."
            )
        self.checked = self.step

    def save_adapter(self, path: Path, save_dtype: Any = "fp32") -> Path:
        """Write the adapter as it is now, or its average where one is kept."""
        training = {"record": self.record, "captions": self.about["captions"]}
        with self.shown():
            adapter = adapter_of_pipeline(
                self.model.pipeline,
                ADAPTER_NAME,
                base_model=self.model.model_id,
                trigger_words=self.about["trigger_words"],
                training=training,
            )
        return adapter.save(path, save_dtype=save_dtype)

    def checkpoint(self) -> Path:
        """Save a checkpoint of this step; the main process writes."""
        self.check_finite()
        folder = self.output / f"checkpoint-{self.step}"
        if self.place.main:
            kept = kept_tensors(self.model.denoiser, ADAPTER_NAME)
            tensors = {CURVES: self.curves[:, : self.step], **{KEPT + key: tensor for key, tensor in kept.items()}}
            tensors |= optimiser_tensors(self.optimiser, self.parameters)
            if self.average is not None:
                tensors |= {EMA + name: tensor for name, tensor in self.average.tensors().items()}
            replace = folder in self.outdated
            with self.telling_what_is_kept():
                save_checkpoint(self.output, self.step, self.record, tensors, self.save_adapter, replace=replace)
            self.forget_outdated(folder.name)
            prune_checkpoints(self.output, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        self.last_good = folder
        return folder

    @contextmanager
    def telling_what_is_kept(self) -> Iterator[None]:
        """A file that cannot be written (a full disk, mostly) ends the run, but not what was saved before."""
        try:
            yield
        except QrloraError as error:
            kept = (
                f"The last complete checkpoint is {self.last_good}; make room and continue with resume: latest."
                if self.last_good
                else "No checkpoint was written before that."
            )
            raise QrloraError(f"{error} {kept}") from error

    def forget_outdated(self, *written: str) -> None:
        """Remove what this run made outdated, now that the names in `written` are there."""
        forget(self.outdated, keep=written)
        self.outdated = []

    def note(self) -> str:
        """The mean loss of the last steps; waits for the device."""
        return f"loss {float(self.curves[0, max(0, self.step - 20) : self.step].mean()):.4f}"

    def after_step(self, report: ProgressReport, stop: StopRequest, on_step: OnStep | None) -> None:
        """Everything that happens now and then."""
        config, last = self.config, self.step == self.config.max_train_steps
        if self.place.device.type == "cpu" or self.step % 10 == 0 or last:
            self.check_finite()
        if self.step % config.checkpointing_steps == 0:
            self.checkpoint()
        # A base in shares computes on all processes or on none.
        draws = self.place.main or self.place.sharded
        if self.validation is not None and draws and (self.step % config.validation_steps == 0 or last):
            with self.autocast(), self.shown(), self.telling_what_is_kept():
                pictures = self.validation.run(self.model, self.step, keep=self.place.main)
                self.trackers.pictures(pictures, self.step)
        if self.place.main and report.due(self.step):
            report.show(self.step, self.note())
        if self.trackers.due(self.step) or last:
            with self.telling_what_is_kept():
                self.trackers.curves(self.curves, self.step, self.rates)
        if on_step is not None:
            on_step(self.step, config.max_train_steps)
        if self._asked_to_stop(stop) and not last:
            raise Interrupted(self.step, self.checkpoint(), stop.signal_number or 2)

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        if self.place.processes == 1:
            return bool(stop.signal_number)
        asked: Any = self.accelerator.reduce(torch.tensor(float(stop.signal_number), device=self.place.device))
        return bool(asked > 0)
