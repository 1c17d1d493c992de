"""A write that fails leaves what was there, and nothing else."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrlora.errors import QrloraError
from qrlora.formats import atomic_write


def test_writes_text_bytes_and_chunks_into_new_folders(tmp_path: Path) -> None:
    assert atomic_write(tmp_path / "a" / "b" / "t.txt", "häuser").read_text(encoding="utf-8") == "häuser"
    assert atomic_write(tmp_path / "b.bin", b"\0\1").read_bytes() == b"\0\1"
    assert atomic_write(tmp_path / "c.bin", iter([b"ab", b"", b"c"])).read_bytes() == b"abc"
    assert atomic_write(tmp_path / "c.bin", b"new").read_bytes() == b"new"


def test_a_failing_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "kept.bin"
    target.write_bytes(b"old")

    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        atomic_write(target, chunks())
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.bin"]


def test_a_folder_or_an_impossible_place_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match="is a folder"):
        atomic_write(tmp_path, "text")
    (tmp_path / "file").write_text("x")
    with pytest.raises(QrloraError, match="cannot be written"):
        atomic_write(tmp_path / "file" / "below.txt", "text")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system without advice")
def test_advice_that_is_refused_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refused)
    content = bytes(range(256)) * 4096 * 20
    assert atomic_write(tmp_path / "large", [content]).read_bytes() == content


def test_an_interrupt_right_after_the_rename_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def interrupted(*paths: Path) -> None:
        real(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "new"
