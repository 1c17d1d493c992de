"""Files of adapters that no other tool knows, in keys of their own.

Keys are `{component}.{layer}.{form}.B`, `.A` and `.{key}` for the form's own tensors, so stock loaders refuse the file
instead of taking a part of it for the whole.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._adapter import Adapter, LowRank, SaveDtype, check_finite
from qrlora.formats._factors import natural_key
from qrlora.formats._header import header_metadata, read_header
from qrlora.formats._later import Later
from qrlora.formats._native import (
    component_in,
)
from qrlora.formats._saving import cast_to_save, checked_path, stored_pairs
from qrlora.formats._write_safetensors import write_safetensors


def write_own_form(adapter: Adapter, path: str | Path, *, save_dtype: SaveDtype = "fp32") -> Path:
    """Write an adapter with tensors beyond a low-rank pair, whole.

    Raises:
        QrloraError: no form in the header, a value that is not finite (nothing is written), or the file cannot be
            written.
    """
    target = checked_path(path)
    adapter.check_alone(
        f"written as a {adapter.form} adapter", "write adapter.alone(), and the companions by themselves"
    )
    if adapter.form is None:
        raise QrloraError(f"{adapter.label} has tensors beyond a low-rank pair, but its header names no form.")
    stem = f"{adapter.component}.{{}}.{adapter.form}.".format
    tensors: dict[str, Tensor | Later] = dict(
        stored_pairs(adapter.layers, lambda name: (f"{stem(name)}A", f"{stem(name)}B"), save_dtype)
    )
    for name, own in adapter.own.items():
        for key, tensor in own.items():
            tensors[f"{adapter.component}.{name}.{adapter.form}.{key}"] = cast_to_save(name, tensor, save_dtype)
    return write_safetensors(target, tensors, {"format": "pt", **header_metadata(adapter)})


def own_form_from(source: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """The adapter that such a file's tensors and metadata are.

    Raises:
        QrloraError: no header that names a form, or a key that is not of that form, incomplete or not finite.
    """
    header = read_header(source, metadata)
    if header is None or header.form is None:
        raise QrloraError(f"{source} has no header that names a form of adapters.")
    component, form = component_in(source, tensors), header.form
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, named, part = key.removeprefix(f"{component}.").rpartition(f".{form}.")
        if not named or "." in part or not tensor.is_floating_point():
            raise QrloraError(f"{source}: {key} is no tensor of a {form} adapter (LAYER.{form}.A, B and others).")
        check_finite(f"{source}: {key}", tensor)
        found.setdefault(name, {})[part] = tensor.float()
    layers: dict[str, LowRank] = {}
    for name in sorted(found, key=natural_key):
        for factor in ("B", "A"):
            if factor not in found[name]:
                raise QrloraError(f"{source}: {name}.{form}.{factor} is missing; the file is incomplete.")
        layers[name] = LowRank(found[name].pop("B"), found[name].pop("A"))
    return Adapter(layers, header, component, found, source=str(source))
