"""How adapters relate: similarity, angles, norms and expert usage, each beside what random matrices give.

The mathematics is pure torch; pictures are drawn by matplotlib, and the pages of a report need neither.
"""

from qrlora.analysis._analyze import adapter_names, analyze
from qrlora.analysis._names import numbered, short_names
from qrlora.analysis._report import (
    AdapterFacts,
    LayerFacts,
    LayerPair,
    Measure,
    Pair,
    RandomSettings,
    Report,
    Total,
)
from qrlora.analysis._similarity import bin_count, cosine, linear_cka, mutual_information
from qrlora.analysis._spaces import (
    Factors,
    UpdateSpace,
    effective_rank,
    inner_product,
    principal_angles,
    update_cosine,
    update_space,
)
from qrlora.analysis._usage import (
    ExpertUsage,
    UsageComparison,
    UsageReport,
    compare_usage,
    report_usage,
    usage_entropy,
)
from qrlora.analysis._write import write_report

__all__ = [
    "AdapterFacts",
    "ExpertUsage",
    "Factors",
    "LayerFacts",
    "LayerPair",
    "Measure",
    "Pair",
    "RandomSettings",
    "Report",
    "Total",
    "UpdateSpace",
    "UsageComparison",
    "UsageReport",
    "adapter_names",
    "analyze",
    "bin_count",
    "compare_usage",
    "cosine",
    "effective_rank",
    "inner_product",
    "linear_cka",
    "mutual_information",
    "numbered",
    "principal_angles",
    "report_usage",
    "short_names",
    "update_cosine",
    "update_space",
    "usage_entropy",
    "write_report",
]
