"""Every benchmark can at least be begun: what one module takes from another is there."""

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "benchmarks").rglob("*.py"))]
MODULES = [".".join(file.parts).removesuffix(".__init__") for file in FILES]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_it_finds_what_it_imports(name: str) -> None:
    assert import_module(name).__name__ == name
