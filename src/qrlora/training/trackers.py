"""accelerate's trackers (tensorboard, wandb...), fed in batches so that the device is not read every step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.training.config import TrainConfig
from qrlora.training.setup import Place, plain_settings
from qrlora.training.validation import log_pictures

EVERY = 20


class Trackers:
    """Nothing at all without `report_to`, and on all but the main process."""

    def __init__(self, config: TrainConfig, place: Place, first: int) -> None:
        self._accelerator: Accelerator | None = None
        self._logged = first
        if config.report_to is None or not place.main:
            return
        folder = Path(config.output_dir) / config.logging_dir
        try:
            accelerator = Accelerator(mixed_precision="no", log_with=config.report_to, project_dir=folder)
        except ValueError as error:
            raise QrloraError(f"report_to={config.report_to} is not a tracker of accelerate: {error}.") from error
        if not accelerator.log_with:
            raise QrloraError(
                f"report_to={config.report_to} is not installed; pip install {config.report_to}, or leave report_to "
                "out."
            )
        self._accelerator, self._name = accelerator, config.report_to
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            accelerator.init_trackers("qrlora", config=plain_settings(config))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except QrloraError:
            if error is None:  # else what went wrong first is what to tell
                raise

    def due(self, step: int) -> bool:
        """Whether `curves` would log something worth reading the device for."""
        return self._accelerator is not None and step % EVERY == 0

    def curves(self, curves: Tensor, step: int, rates: Callable[[int], float]) -> None:
        """Log loss, gradient norm and learning rate of every step since the last call."""
        if self._accelerator is None:
            return
        first = self._logged
        losses, norms = curves[:, first:step].tolist()
        for offset, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            values = {"loss": loss, "grad_norm": norm, "lr": rates(first + offset)}
            with self._writing():
                self._accelerator.log(values, step=first + offset + 1)
        self._logged = step

    def pictures(self, pictures: list[Image.Image], step: int) -> None:
        """Log validation pictures."""
        if self._accelerator is not None:
            with self._writing():
                log_pictures(self._accelerator.trackers, pictures, step)

    def close(self) -> None:
        """Flush and close."""
        if self._accelerator is not None:
            with self._writing():
                for tracker in self._accelerator.trackers:  # accelerate's end_training would leave the launch, too
                    tracker.finish()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise QrloraError(f"report_to={self._name} cannot log: {error.strerror or error}.") from error
