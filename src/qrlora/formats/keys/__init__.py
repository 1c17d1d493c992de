"""The names that the original code of each model family gives to the layers of its diffusers denoiser.

A family's names are one file here (`flux.py`), which makes one `KeyTable`.
"""

from importlib import import_module
from pkgutil import iter_modules

from qrlora.errors import QrloraError
from qrlora.formats.keys._table import Entry, KeyTable, Part, Swap, Target
from qrlora.formats.keys.flux import FLUX
from qrlora.formats.keys.flux2 import FLUX2, is_flux2

TABLES: tuple[KeyTable, ...] = tuple(
    value
    for module in iter_modules(__path__)
    if not module.name.startswith("_")
    for value in vars(import_module(f"{__name__}.{module.name}")).values()
    if isinstance(value, KeyTable)
)


def table_of(family: str) -> KeyTable:
    """The names of a family.

    Raises:
        QrloraError: there are none of it.
    """
    for table in TABLES:
        if table.family == family:
            return table
    known = ", ".join(sorted(table.family for table in TABLES))
    raise QrloraError(f"family {family!r} is not known; use one of {known}.")


__all__ = [
    "FLUX",
    "FLUX2",
    "TABLES",
    "Entry",
    "KeyTable",
    "Part",
    "Swap",
    "Target",
    "is_flux2",
    "table_of",
]
