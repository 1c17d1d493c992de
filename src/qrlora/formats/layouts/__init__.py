"""One file a layout; each registers itself."""

from importlib import import_module
from pkgutil import iter_modules


def load_layouts() -> None:
    """Import every layout, so that it registers itself."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
