"""Shared fixtures. Nothing here or in any test needs the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the hub's client

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from tests.tiny_newer import save_qwen_image, save_z_image
from tests.tiny_pipelines import save_flux, save_sd3, save_sdxl

transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _own_basis_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache of bases out of the tests, and the tests out of it."""
    before = os.environ.get("QRLORA_CACHE")
    os.environ["QRLORA_CACHE"] = str(tmp_path_factory.mktemp("bases"))
    yield
    if before is None:
        del os.environ["QRLORA_CACHE"]
    else:
        os.environ["QRLORA_CACHE"] = before


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny FluxPipeline; read only."""
    return save_flux(tmp_path_factory.mktemp("models") / "tiny-flux")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny StableDiffusion3Pipeline; read only."""
    return save_sd3(tmp_path_factory.mktemp("models") / "tiny-sd3")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny StableDiffusionXLPipeline that predicts noise; read only."""
    return save_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny QwenImagePipeline; read only."""
    return save_qwen_image(tmp_path_factory.mktemp("models") / "tiny-qwen-image")


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny ZImagePipeline; read only."""
    return save_z_image(tmp_path_factory.mktemp("models") / "tiny-z-image")
