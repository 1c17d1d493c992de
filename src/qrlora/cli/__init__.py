"""The command line: `qrlora VERB ...`, one thin file a verb."""

from qrlora.cli.main import main

__all__ = ["main"]
