"""Scores of pictures: like the content, like the style, like the words, like the truth, and drift.

One class a metric, in `metrics/`; what they share is cosines (`similarity`, `distance`, `nearest`) and the bootstrap.
"""

from qrlora.evaluation import metrics as _metrics  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers them)
from qrlora.evaluation._bootstrap import LEVEL, RESAMPLES, Interval, bootstrap_mean
from qrlora.evaluation._distances import hellinger, multiscale
from qrlora.evaluation._evaluate import evaluate, measure_drift
from qrlora.evaluation._metric import DEFAULT_METRICS, Metric, load_metrics, metric_names, register_metric
from qrlora.evaluation._report import Difference, Drift, Estimate, Group, Measure, PictureScores, Report
from qrlora.evaluation._samples import DriftPair, Sample
from qrlora.evaluation._scores import distance, nearest, similarity
from qrlora.evaluation._scoring import CENTRED_FROM
from qrlora.evaluation._statistics import picture_statistics
from qrlora.evaluation._write import write_report
from qrlora.evaluation.metrics.efficientnet import EfficientNetFeatures

__all__ = [
    "CENTRED_FROM",
    "DEFAULT_METRICS",
    "LEVEL",
    "RESAMPLES",
    "Difference",
    "Drift",
    "DriftPair",
    "EfficientNetFeatures",
    "Estimate",
    "Group",
    "Interval",
    "Measure",
    "Metric",
    "PictureScores",
    "Report",
    "Sample",
    "bootstrap_mean",
    "distance",
    "evaluate",
    "hellinger",
    "load_metrics",
    "measure_drift",
    "metric_names",
    "multiscale",
    "nearest",
    "picture_statistics",
    "register_metric",
    "similarity",
    "write_report",
]
