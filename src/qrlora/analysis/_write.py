"""A report as a folder."""

from pathlib import Path

from qrlora.analysis._html import page
from qrlora.analysis._pictures import adapter_pictures, pair_pictures
from qrlora.analysis._report import Report
from qrlora.analysis._usage_pictures import usage_pictures
from qrlora.formats import atomic_write


def write_report(report: Report, folder: str | Path) -> Path:
    """Write `report.html`, its pictures as PNG files, and `report.json`.

    Args:
        report: by `analyze`.
        folder: made where it is missing; files of the same names are replaced.

    Returns:
        The path of `report.html`, which is written last and holds its pictures itself.

    Raises:
        QrloraError: a file cannot be written.
    """
    target = Path(folder)
    names = [facts.name for facts in report.adapters]
    adapters = [adapter_pictures(index, facts) for index, facts in enumerate(report.adapters)]
    pairs = [pair_pictures(names, pair) for pair in report.pairs]
    usage = usage_pictures(report.usage) if report.usage is not None else []
    for pictures in (*adapters, *pairs, usage):
        for picture in pictures:
            atomic_write(target / picture.file, picture.content)
    atomic_write(target / "report.json", report.model_dump_json(indent=1))
    return atomic_write(target / "report.html", page(report, adapters, pairs, usage))
