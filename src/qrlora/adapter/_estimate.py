"""How long the bases of an adapter will take, before a user waits for them."""

from torch import nn

from qrlora.adapter._cache import BasisCache
from qrlora.adapter._spec import AdapterSpec
from qrlora.adapter._weights import dense_weight
from qrlora.adapter.targets import adaptable_layers, target_layers
from qrlora.basis import as_matrix, basis_names, basis_seconds

_WORTH_SAYING = 60.0


def basis_notice(denoiser: nn.Module, spec: AdapterSpec, *, cache: BasisCache | None = None) -> str | None:
    """A sentence for users about a long wait for bases; None where there is none. See `estimate_seconds`."""
    seconds = estimate_seconds(denoiser, spec, cache=cache)
    if seconds is None or seconds < _WORTH_SAYING:
        return None
    minutes = round(seconds / 60)
    told = f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
    return f"basis {spec.basis}: up to about {told}, by an iteration timed on the first layer; kept for later runs"


def estimate_seconds(denoiser: nn.Module, spec: AdapterSpec, *, cache: BasisCache | None = None) -> float | None:
    """About how many seconds `add_adapter` will spend on bases at most; None where that is not worth asking.

    For a basis that can take hours (ica), a part of its work is timed on the first layer and extrapolated over those
    that the cache does not hold yet.

    Args:
        denoiser: the denoiser that will be adapted.
        spec: the adapter that will be added.
        cache: where bases are kept; the default folder where None.

    Raises:
        QrloraError: no matching layer, or a packed weight of unknown type.
    """
    if spec.basis not in basis_names() or basis_seconds(spec.basis, [], spec.rank) is None:
        return None
    store = cache if cache is not None else BasisCache()
    modules = adaptable_layers(denoiser)
    shapes: list[tuple[int, int]] = []
    device = None
    for layer in target_layers(denoiser, spec.target_modules, spec.blocks):
        weight = dense_weight(modules[layer], layer)
        device = device or weight.device
        if not store.holds(weight, spec, layer):
            out, inputs = as_matrix(weight, layer=layer).shape
            shapes.append((out, inputs))
    return basis_seconds(spec.basis, shapes, spec.rank, device)
