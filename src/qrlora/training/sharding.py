"""The frozen base in shares, one a process (FSDP2); adapters stay whole on each."""

import warnings
from typing import Any

import torch
from torch import nn

from qrlora.errors import QrloraError
from qrlora.models import LoadedModel, repeated_blocks
from qrlora.training.config import TrainConfig


def check_shardable(config: TrainConfig, model: LoadedModel, *, given: bool) -> None:
    """Refuse what does not go with a base in shares.

    Args:
        config: with nothing left open.
        model: its denoiser need not be loaded.
        given: whether the model is the caller's, and is to be given back whole.

    Raises:
        QrloraError: as said.
    """
    if given:
        raise QrloraError(
            "a model that was loaded already stays whole; launch without --use_fsdp, or let it be loaded."
        )
    quantised = config.quantization or model.denoiser.config.get("quantization_config")
    if quantised is not None:
        raise QrloraError(
            "quantised weights cannot be shared out by FSDP; launch without --use_fsdp, or drop quantization."
        )
    if config.offload != "none":
        raise QrloraError(f"offload: {config.offload} and --use_fsdp both make the base smaller on a device; drop one.")


def shard(denoiser: nn.Module, device: torch.device, processes: int) -> None:
    """Leave this process its share of the base, and put it and the adapters on `device`.

    A block is whole there only while it computes. Adapters are no part of that: they are few, and masks, optimisers and
    checkpoints work on them as in one process. Parameters of adapters stay the objects they are.

    Args:
        denoiser: whole, anywhere, with its adapters.
        device: of this process.
        processes: of the launch.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for name, module in denoiser.named_modules():
        if name.rpartition(".")[2].startswith("lora_"):
            module.to(device)
    adapters = {parameter for name, parameter in denoiser.named_parameters() if "lora_" in name}
    settings: dict[str, Any] = {"mesh": init_device_mesh(device.type, (processes,)), "ignored_params": adapters}
    for block in repeated_blocks(denoiser).values():
        fully_shard(block, **settings)
    fully_shard(denoiser, **settings)
    # Advice to who writes models; that gradients are those of one process is tested for the families.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
