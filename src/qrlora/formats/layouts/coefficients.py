"""Our own file of trained factors alone, which is no adapter without its base model; see `write_coefficients`."""

from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._coefficients import is_coefficients
from qrlora.formats._layout import AdapterFile, Evidence, Layout, ReadOptions, register_layout

_NEEDS = (
    "holds coefficients only, which need their base model: qrlora merge FILE --model MODEL --output WHOLE makes it "
    "whole (in Python, qrlora.adapter.resolve_coefficients)"
)


class CoefficientsAlone(Layout):
    name = "coefficients"
    title = "qrlora, coefficients only"

    def detect(self, file: AdapterFile, options: ReadOptions) -> Evidence | None:
        return Evidence(len(file.entries), "the header says so") if is_coefficients(dict(file.metadata)) else None

    def needs(self, file: AdapterFile, options: ReadOptions) -> str:
        return _NEEDS

    def match(self, file: AdapterFile, options: ReadOptions) -> Mapping[str, str]:
        ours = (".coefficients", ".fingerprint")
        return {key: key.rpartition(".")[0] for key in file.entries if key.endswith(ours)}

    def build(self, file: AdapterFile, tensors: Mapping[str, Tensor], options: ReadOptions) -> NoReturn:
        raise QrloraError(f"{file.source} {_NEEDS}.")


register_layout(CoefficientsAlone())
