"""What makes two runs the same run: compared before resuming, and kept in the result's header."""

import math
from collections.abc import Mapping
from typing import Any

from qrlora.adapter import AdapterSpec
from qrlora.errors import QrloraError
from qrlora.training.config import TrainConfig

# These change where things are, what is reported or how memory is used, but not one bit of the coefficients. The
# pictures, captions and base weights are compared by hash instead of by path.
FREE = frozenset(
    {
        "model",
        "instance_data_dir",
        "instance_prompt",
        "dataset_name",
        "dataset_config_name",
        "image_column",
        "caption_column",
        "class_data_dir",
        "output_dir",
        "overwrite",
        "device",
        "gradient_checkpointing",
        "memory",
        "offload",
        "encoder_offload",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume",
        "init_from",
        "validation_prompt",
        "validation_steps",
        "num_validation_images",
        "report_to",
        "logging_dir",
        "save_dtype",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
    }
)
ORIGIN = "init_from"
"""Kept for the record, not compared: a resumed run is told nothing of what the first one started from."""
_UNLIMITED = "inf"
_STEADY = ("constant", "constant_with_warmup")
_CULPRITS = {
    "data": "instance_data_dir (the pictures, masks or captions)",
    "class_data": "class_data_dir (the class pictures)",
    "base": "model (the base weights)",
}
_BATCHES = ("train_batch_size", "gradient_accumulation_steps")
"""How a step's pictures are drawn. Another number of processes may take them otherwise; see `split`."""


def record_of(
    config: TrainConfig,
    *,
    data: str,
    base: str,
    origin: str | None = None,
    class_data: str | None = None,
) -> dict[str, Any]:
    """The settings that decide the result, flat, with hashes of the pictures, base weights and the adapter started
    from.

    Batch size and accumulation are those of `Split.config`: of one process that computes alone.
    """
    record: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        if key == "adapter":
            record |= {f"adapter.{name}": part for name, part in value.items()}
        elif key not in FREE:
            record[key] = _UNLIMITED if value == math.inf else value  # which JSON does not have
    hashes = {"data": data, "base": base, ORIGIN: origin} | ({} if class_data is None else {"class_data": class_data})
    return {**record, **hashes}


def check_same_run(now: Mapping[str, Any], then: Mapping[str, Any], where: str) -> None:
    """Refuse to continue a run under settings that would make it another run.

    More or fewer `max_train_steps` are fine where the learning rate does not depend on them, and so is another number
    of processes, batch size or accumulation, as long as a step has as many pictures.

    Raises:
        QrloraError: names the first key that differs, with both values.
    """
    # What a checkpoint of an older version does not know was at its default.
    then = _defaults() | dict(then)
    if then["max_grad_norm"] in (None, math.inf):  # as older versions wrote what they did not limit
        then["max_grad_norm"] = _UNLIMITED
    _check_pictures(now, then, where)
    # Settings before hashes, some of which follow from settings.
    for key in sorted(set(now) | set(then), key=lambda key: (key in _CULPRITS, key)):
        if key in _BATCHES or (key == "max_train_steps" and now.get("lr_scheduler") in _STEADY):
            continue
        if key != ORIGIN and now.get(key) != then.get(key):
            shown = _CULPRITS.get(key, key)
            values = "" if key in ("data", "class_data", "base") else f" ({then.get(key)!r} then, {now.get(key)!r} now)"
            raise QrloraError(
                f"cannot resume from {where}: {shown} differs from that run{values}; restore it, or start a new run in "
                "another output_dir."
            )


def _check_pictures(now: Mapping[str, Any], then: dict[str, Any], where: str) -> None:
    if then.pop("processes", 1) != 1:
        raise QrloraError(
            f"cannot resume from {where}: it was begun on several processes by an older version, which drew otherwise; "
            "start a new run in another output_dir."
        )
    has, had = (record["train_batch_size"] * record["gradient_accumulation_steps"] for record in (now, then))
    if has != had:
        raise QrloraError(
            f"cannot resume from {where}: train_batch_size x gradient_accumulation_steps x processes, the pictures of "
            f"a step, differ from that run ({had} then, {has} now); restore them, or start a new run in another "
            "output_dir."
        )


def _defaults() -> dict[str, Any]:
    adapter = AdapterSpec().model_dump(mode="json")
    fields = {name: field.default for name, field in TrainConfig.model_fields.items() if not field.is_required()}
    plain = {name: value for name, value in fields.items() if name not in FREE and name != "adapter"}
    return {f"adapter.{name}": value for name, value in adapter.items()} | plain
