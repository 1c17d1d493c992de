"""The names that the original code of each model family gives to the layers of its diffusers denoiser."""

from qrlora.formats.keys._table import Entry, Family, KeyTable, Part, Swap, Target
from qrlora.formats.keys.flux import FLUX
from qrlora.formats.keys.sd3 import SD3
from qrlora.formats.keys.sdxl import SDXL

TABLES: tuple[KeyTable, ...] = (FLUX, SD3, SDXL)

__all__ = ["FLUX", "SD3", "SDXL", "TABLES", "Entry", "Family", "KeyTable", "Part", "Swap", "Target"]
