"""One file a basis: every module of this folder is imported, so a new file is a new basis."""

from importlib import import_module
from pkgutil import iter_modules


def load_bases() -> None:
    """Import every module of this folder; each registers its basis."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
