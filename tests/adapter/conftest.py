from collections.abc import Iterator
from pathlib import Path

import pytest

from qrlora.adapter import BasisCache


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No test reads or fills the user's cache of bases."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QRLORA_CACHE", str(folder))
    BasisCache.forget()
    yield folder
    BasisCache.forget()
