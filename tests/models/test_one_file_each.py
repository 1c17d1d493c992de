"""A family is one file: no other module of the package knows it."""

from pathlib import Path

import qrlora
from qrlora.formats.keys import TABLES
from qrlora.models import family_names

SOURCES = Path(qrlora.__file__).parent
FAMILIES = [path.stem for path in (SOURCES / "models").glob("[!_]*.py")]


def test_nothing_imports_a_family() -> None:
    assert {"flux", "sdxl", "z_image"} <= set(FAMILIES)
    importers = [
        (path.name, family)
        for path in SOURCES.rglob("*.py")
        for family in FAMILIES
        if f"qrlora.models.{family} " in path.read_text(encoding="utf-8")
    ]
    assert importers == []


def test_files_are_found_by_themselves() -> None:
    assert len(family_names()) == len(FAMILIES) + 1  # FLUX.2's two are one file
    tables = list((SOURCES / "formats" / "keys").glob("[!_]*.py"))
    assert len({table.family for table in TABLES}) == len(TABLES) == len(tables)
