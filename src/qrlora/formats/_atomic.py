"""Files appear whole or not at all: a temporary file in the same folder, fsync, then a rename over the target."""

import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from qrlora.errors import QrloraError

_WINDOW = 1 << 24  # bytes handed to the disk together


def atomic_write(
    path: str | Path, content: str | bytes | Iterable[bytes | memoryview], *, front: Callable[[], bytes] | None = None
) -> Path:
    """Write `content` to `path` so that a reader, a crash or a full disk never leaves half a file.

    Missing parent folders are made. Text is written as UTF-8; an iterable of byte chunks is streamed. Whatever goes
    wrong, also inside the iterable, the temporary file is removed and an existing `path` keeps its old content.

    Args:
        path: the file.
        content: all of it.
        front: asked for when the content was written, and put in the place of its first bytes.

    Raises:
        QrloraError: the file cannot be written (no permission, no space, `path` is a folder).
    """
    target = Path(path)
    chunks = _chunks(content)
    if target.is_dir():
        raise QrloraError(f"{target} is a folder; give the name of a file to write.")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            try:
                _stream(chunks, stream)
                if front is not None:
                    stream.seek(0)
                    stream.write(front())
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
                os.replace(temporary, target)
            except BaseException:
                # Also for Ctrl-C: whatever interrupts, no half file stays. Closing flushes, which a full disk refuses
                # once more; the first refusal is the one to tell.
                with suppress(OSError):
                    stream.close()
                temporary.unlink(missing_ok=True)  # an interrupt may come when it has its name already
                raise
    except OSError as error:
        raise QrloraError(f"{target} cannot be written: {error.strerror or error}.") from error
    _sync_folder(target.parent)
    return target


def _chunks(content: str | bytes | Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    if isinstance(content, str):
        return (content.encode(),)
    return (content,) if isinstance(content, bytes) else content


def _stream(chunks: Iterable[bytes | memoryview], stream: BinaryIO) -> None:
    """Write the chunks; the disk is set to work while later ones are made, instead of all at once at the end.

    The advice that bytes are not needed begins to write them out, and drops from memory those that were written, so
    large files take no more of it than small ones. Where the system takes no advice, `fsync` does all the writing.
    """
    begun = written = 0
    for chunk in chunks:
        written += stream.write(chunk)
        if written - begun < _WINDOW or not hasattr(os, "posix_fadvise"):
            continue
        # Bytes on their way to the disk are not dropped, so those of the window before are named again.
        with suppress(OSError):  # advice that is refused, as some file systems do
            os.posix_fadvise(stream.fileno(), max(0, begun - 2 * _WINDOW), 0, os.POSIX_FADV_DONTNEED)
        begun = written


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the platform lets a folder be opened (Windows does not)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
