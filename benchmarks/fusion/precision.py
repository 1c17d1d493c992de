"""The denoiser in bfloat16, where a processor multiplies that faster: everything around it stays in float32."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Precision = Literal["float32", "bfloat16"]


@contextmanager
def computing(denoiser: nn.Module, precision: Precision) -> Iterator[None]:
    """Within this context the denoiser's products are computed in `precision`; weights and outputs are float32.

    Args:
        denoiser: given back as it was.
        precision: "bfloat16" is autocast around its forward pass.
    """
    if precision == "float32":
        yield
        return
    forward = denoiser.forward

    def cast(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(next(denoiser.parameters()).device.type, torch.bfloat16))
            if torch.is_grad_enabled():
                # On a CPU the backward pass of flash attention takes half of a bfloat16 step, and this one a tenth.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            return _float32(forward(*args, **kwargs))

    denoiser.forward = cast
    try:
        yield
    finally:
        del denoiser.forward


def _float32(output: Any) -> Any:
    """diffusers' denoisers give a tuple of one tensor, or an object that holds it."""
    if isinstance(output, tuple):
        return tuple(part.float() if isinstance(part, Tensor) else part for part in output)
    output.sample = output.sample.float()
    return output
