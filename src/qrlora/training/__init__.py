"""Training: one loop for every model family, exact to resume."""

from qrlora.training.checkpoint import Checkpoint, checkpoint_folders, latest_checkpoint, open_checkpoint
from qrlora.training.config import TrainConfig
from qrlora.training.estimate import Estimate, Phase, estimate, fitting_memory
from qrlora.training.interrupt import Interrupted
from qrlora.training.loop import TrainResult, train
from qrlora.training.memory import GIB, load_for

__all__ = [
    "GIB",
    "Checkpoint",
    "Estimate",
    "Interrupted",
    "Phase",
    "TrainConfig",
    "TrainResult",
    "checkpoint_folders",
    "estimate",
    "fitting_memory",
    "latest_checkpoint",
    "load_for",
    "open_checkpoint",
    "train",
]
