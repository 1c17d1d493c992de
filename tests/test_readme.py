"""What the README shows is what works: its examples run, its links and commands exist."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qrlora import starter
from qrlora.cli import main
from qrlora.cli._main import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_MARKED = re.compile(r"<!-- runs in the tests -->\n```(\w+)\n(.*?)```", re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://)([^)#]+)")
_COMMAND = re.compile(r"\bqrlora ([a-z]+)\b(?= (?:-|[A-Z]|[a-z]+\.|init|check))")


@pytest.fixture
def desk(tmp_path: Path, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README's pictures, and a tiny model in the place of the embedded base: seconds, not minutes."""
    model = shutil.copytree(tiny_flux, tmp_path / "model")
    settings = json.loads((model / "qrlora.json").read_text())
    settings["training"]["max_train_steps"] = 2
    (model / "qrlora.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "path", lambda: model)
    generator = np.random.default_rng(0)
    for name in ("dog", "ink"):
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), np.uint8)).save(f"{name}.png")
    return tmp_path


def test_examples_run_in_their_order(desk: Path) -> None:
    blocks = _MARKED.findall(README)
    assert [language for language, _ in blocks] == ["sh", "sh", "python"]
    for language, text in blocks:
        if language == "python":
            Path("both.safetensors").unlink()
            exec(compile(text, "README.md", "exec"), {})  # it is our own text
            continue
        for line in text.strip().splitlines():
            words = shlex.split(line)
            assert words[0] == "qrlora"
            assert main(words[1:]) == 0, line
    for name in ("out/blend.png", "dog.ink.png", "again.png", "both.safetensors", "content.safetensors"):
        assert Path(name).is_file(), name


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_verbs_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in _LINK.findall(text):
        assert (document.parent / target).exists(), target
    assert set(_COMMAND.findall(text)) <= set(VERBS)
