"""Weights of a blend: told, the model's own, or 1."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from qrlora.blend import BlendConfig
from qrlora.blend.weights import GRID, weights_of
from qrlora.errors import QrloraError
from qrlora.models import LoadedModel


@pytest.fixture
def with_weights(model: LoadedModel) -> Callable[[dict[str, Any]], LoadedModel]:
    return lambda weights: replace(model, weights=MappingProxyType(weights))


def test_what_is_told_wins_over_the_models_own_and_that_over_one(
    with_weights: Callable[[dict[str, Any]], LoadedModel], tmp_path: Path
) -> None:
    own = with_weights({"style": 1.4, "styles": [0, 1.4]})
    found = weights_of(BlendConfig(output=tmp_path), own)
    assert (found.content, found.style, found.contents, found.styles) == (1.0, 1.4, GRID, (0.0, 1.4))
    told = BlendConfig(output=tmp_path, style_weight=0.5, content_weight=0.0, style_weights=(0.25,))
    found = weights_of(told, own)
    assert (found.content, found.style, found.contents, found.styles) == (0.0, 0.5, GRID, (0.25,))
    plain = weights_of(BlendConfig(output=tmp_path), with_weights({}))
    assert (plain.content, plain.style, plain.contents, plain.styles) == (1.0, 1.0, GRID, GRID)


@pytest.mark.parametrize("weights", [{"style": "much"}, {"styles": 1.4}, {"weight": 1.0}, {"style": float("nan")}])
def test_weights_of_a_folder_that_are_none_are_told(
    with_weights: Callable[[dict[str, Any]], LoadedModel], tmp_path: Path, weights: dict[str, Any]
) -> None:
    own = with_weights(weights)
    with pytest.raises(QrloraError, match=f"qrlora.json of .*: weights: {next(iter(weights))}"):
        weights_of(BlendConfig(output=tmp_path), own)
