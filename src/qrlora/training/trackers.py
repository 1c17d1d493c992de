"""accelerate's trackers (tensorboard, wandb...), fed in batches so that the device is not read every step."""

from collections.abc import Callable
from pathlib import Path

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
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("qrlora", config=plain_settings(config))
        self._accelerator = accelerator

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
            self._accelerator.log(values, step=first + offset + 1)
        self._logged = step

    def pictures(self, pictures: list[Image.Image], step: int) -> None:
        """Log validation pictures."""
        if self._accelerator is not None:
            log_pictures(self._accelerator.trackers, pictures, step)

    def close(self) -> None:
        """Flush and close."""
        if self._accelerator is not None:
            self._accelerator.end_training()
