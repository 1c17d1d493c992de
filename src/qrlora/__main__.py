"""`python -m qrlora` is `qrlora`."""

import sys

from qrlora.cli import main

sys.exit(main())
