"""Training: one loop for every model family, exact to resume."""

from qrlora.training.checkpoint import Checkpoint, checkpoint_folders, latest_checkpoint, open_checkpoint
from qrlora.training.config import TrainConfig
from qrlora.training.estimate import Estimate, Phase, estimate, fitting_memory
from qrlora.training.interrupt import Interrupted
from qrlora.training.loop import TrainResult, train
from qrlora.training.memory import GIB, load_for
from qrlora.training.processes import leave_launch
from qrlora.training.series import Job, Series, check_on_model, read_series
from qrlora.training.train_many import JobResult, JobsFailed, check_summary, load_for_series, train_series

__all__ = [
    "GIB",
    "Checkpoint",
    "Estimate",
    "Interrupted",
    "Job",
    "JobResult",
    "JobsFailed",
    "Phase",
    "Series",
    "TrainConfig",
    "TrainResult",
    "check_on_model",
    "check_summary",
    "checkpoint_folders",
    "estimate",
    "fitting_memory",
    "latest_checkpoint",
    "leave_launch",
    "load_for",
    "load_for_series",
    "open_checkpoint",
    "read_series",
    "train",
    "train_series",
]
