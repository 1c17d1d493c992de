"""Training: one loop for every model family, exact to resume."""

from qrlora.training.checkpoint import Checkpoint, checkpoint_folders, latest_checkpoint, open_checkpoint
from qrlora.training.config import TrainConfig
from qrlora.training.interrupt import Interrupted
from qrlora.training.loop import TrainResult, train

__all__ = [
    "Checkpoint",
    "Interrupted",
    "TrainConfig",
    "TrainResult",
    "checkpoint_folders",
    "latest_checkpoint",
    "open_checkpoint",
    "train",
]
