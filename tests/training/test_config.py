"""The configuration: typos, overrides, defaults, round trip."""

from pathlib import Path
from typing import Any

import pytest

from qrlora.adapter import AdapterSpec
from qrlora.errors import QrloraError
from qrlora.training import TrainConfig

BASE: dict[str, Any] = {"instance_data_dir": "dog.png", "output_dir": "out"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1e-4}, r"unknown key learning_rat; did you mean learning_rate\?"),
        ({"adapter": {"rnak": 4}}, r"unknown key adapter\.rnak; did you mean adapter\.rank\?"),
        ({"adapter.bassis": "qr"}, r"unknown key adapter\.bassis; did you mean adapter\.basis\?"),
        ({"rank": 4}, r"unknown key rank; did you mean adapter\.rank\?"),
        ({"lr_schedular": "cosine"}, r"did you mean lr_scheduler\?"),
        ({"max_train_steps": 0}, r"max_train_steps=0 is not valid"),
        ({"mixed_precision": "fp16"}, r"mixed_precision='fp16' is not valid"),
        ({"adapter.rank": "many"}, r"adapter\.rank='many' is not valid"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan is not valid"),
        ({"adapter.basis": "qrr"}, r"adapter\.basis='qrr' is not known; use one of .*qr, .*svd, lora"),
        ({"resume": "latest", "init_from": "a.safetensors"}, r"resume and init_from exclude each other"),
    ],
)
def test_bad_values_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(QrloraError, match=message):
        TrainConfig.parse(BASE | values)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(QrloraError, match="output_dir is missing"):
        TrainConfig.parse({"instance_data_dir": "dog.png"})


def test_yaml_with_overrides(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "instance_data_dir: dog.png\noutput_dir: out\nlearning_rate: 1e-3\nadapter:\n  rank: 8\n  basis: svd\n"
    )
    config = TrainConfig.from_yaml(tmp_path / "c.yaml", {"adapter.rank": "16", "seed": 3})
    assert (config.learning_rate, config.seed) == (1e-3, 3)
    assert config.adapter == AdapterSpec(rank=16, basis="svd")


def test_a_bare_no_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("instance_data_dir: dog.png\noutput_dir: out\nmixed_precision: no\n")
    assert TrainConfig.from_yaml(tmp_path / "c.yaml").mixed_precision == "no"


def test_yaml_that_is_not(tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match=r"nowhere\.yaml cannot be read"):
        TrainConfig.from_yaml(tmp_path / "nowhere.yaml")
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(QrloraError, match="is not YAML"):
        TrainConfig.from_yaml(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("- a")
    with pytest.raises(QrloraError, match="must be a mapping"):
        TrainConfig.from_yaml(tmp_path / "c.yaml")


def test_what_is_given_wins_over_the_models_defaults() -> None:
    config = TrainConfig.parse(BASE | {"learning_rate": 3e-3, "adapter": {"basis": "svd"}})
    filled = config.with_defaults(
        {"learning_rate": 1.0, "max_train_steps": 150, "rank": 16, "adapter": {"mask": "full"}}
    )
    assert (filled.learning_rate, filled.max_train_steps, filled.seed) == (3e-3, 150, 0)
    assert filled.adapter == AdapterSpec(rank=16, basis="svd", mask="full")
    with pytest.raises(QrloraError, match=r"the model's training defaults: unknown key ranks"):
        config.with_defaults({"ranks": 16})


def test_the_resolved_file_reads_back(tmp_path: Path) -> None:
    config = TrainConfig.parse(BASE | {"adapter.target_modules": ["attn.to_q"], "max_grad_norm": float("inf")})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "c.yaml") == config
