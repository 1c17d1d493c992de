"""The one exception users see, the one warning category, and how either is told."""

import hashlib
import os
import sys
import tempfile
from pathlib import Path


class QrloraError(Exception):
    """Bad input, told in one sentence that names the culprit and the way out.

    The command line prints the message and exits with code 2; a library caller can catch this one class for everything
    that the user can mend. Programming errors stay ordinary exceptions.
    """


class QrloraWarning(UserWarning):
    """Something was mended or chosen for the user that they may want to know about."""


def tell(sentence: str) -> None:
    """Print a line on standard error.

    What all processes of a launch have to say is said once on each machine, by the first of them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ or _is_first(sentence):
        print(sentence, file=sys.stderr, flush=True)


def _is_first(sentence: str) -> bool:
    """Processes of one launch have one parent. An empty file in the temporary folder says that it was said."""
    import psutil

    parent = psutil.Process(os.getppid())
    launch = (parent.pid, parent.create_time(), os.environ.get("MASTER_PORT"), sentence)
    name = hashlib.sha256(repr(launch).encode()).hexdigest()[:32]
    try:
        (Path(tempfile.gettempdir()) / f"qrlora-{name}.said").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # nothing can be kept there: rather twice than never
        return True
    return True
