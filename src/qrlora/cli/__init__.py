"""The command line: `qrlora VERB ...`, one thin file a verb."""

from qrlora.cli._main import main

__all__ = ["main"]
