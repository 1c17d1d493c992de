"""`qrlora train [CONFIG.yaml] [--any.key value]`: train one adapter, in one process or in those of a launch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qrlora.cli._options import say
from qrlora.errors import QrloraError

USAGE = """usage: qrlora train [CONFIG.yaml] [--any.key value ...]

Every key of the configuration is an option too and wins over the file: --max_train_steps 500 --adapter.rank 16
(or --max-train-steps). A key alone means true. Needed: instance_data_dir (or dataset_name) and output_dir, and an
instance_prompt for pictures without captions. `qrlora config init` writes a commented configuration.
On several devices: accelerate launch --multi_gpu -m qrlora train ...
"""


def run(arguments: Sequence[str]) -> None:
    """Parse, train, and say where the adapter is."""
    if any(argument in ("-h", "--help") for argument in arguments):
        from qrlora.cli.config import described_keys

        print(USAGE)
        print("\n".join(described_keys()))
        return
    file, overrides = split_arguments(arguments)
    from qrlora.training import TrainConfig, leave_launch, train

    config = TrainConfig.parse(overrides, "the options") if file is None else TrainConfig.from_yaml(file, overrides)
    result = train(config)
    if not leave_launch():
        return
    losses = result.losses[-20:]
    say(f"{len(result.losses)} steps in {result.seconds:.0f} s, last loss {sum(losses) / len(losses):.4f}")
    print(result.path)


def split_arguments(arguments: Sequence[str]) -> tuple[Path | None, dict[str, Any]]:
    """The configuration file, if any, and `--key value...` pairs; pydantic reads the values.

    Raises:
        QrloraError: a second file, or a value without a key.
    """
    file: Path | None = None
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            key = key.replace("-", "_")
            if key in found:
                raise QrloraError(f"--{key} is given twice.")
            current = found[key] = [value] if equals else []
        elif current is not None:
            current.append(argument)
        elif file is None:
            file = Path(argument)
        else:
            raise QrloraError(f"one configuration file at a time; {argument} is a second one.")
    return file, {key: _value(values) for key, values in found.items()}


def _value(values: list[str]) -> Any:
    if not values:
        return True
    if len(values) > 1:
        return values
    return None if values[0] == "null" else values[0]
