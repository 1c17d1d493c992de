"""Our files in stock diffusers and stock peft: the same outputs, with nothing of ours loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import PeftModel
from torch import Tensor

from qrlora.adapter import AdapterSpec, adapter_of, add_adapter, attach_adapter, save_adapter, set_adapters
from qrlora.formats import write_peft_folder
from qrlora.merging import merge
from tests.adapter.test_add_adapter import KINDS, shake, spec_for
from tests.adapters_of_data import dense, relative
from tests.tiny_models import PREFIXES, flux_inputs, inputs, output, tiny, tiny_flux
from tests.tiny_pipelines import flux_pipeline

# peft warns whenever a second adapter is loaded; every other warning is an error.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
WEIGHTS = {"content": 0.9, "style": 1.0}


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return float((one.double() - other.double()).norm() / other.double().norm()) < tolerance


def two_adapters(kind: str, folder: Path, **fields: Any) -> tuple[Any, dict[str, Path]]:
    """A denoiser that carries a content and a style adapter with values, and their files."""
    denoiser = tiny(kind)
    files: dict[str, Path] = {}
    for seed, name in enumerate(WEIGHTS):
        add_adapter(denoiser, spec_for(kind, seed=seed, **fields), name)
        shake(denoiser, name, seed=seed)
        files[name] = save_adapter(denoiser, name, folder / f"{name}.safetensors", base_model="tiny")
    return denoiser, files


@pytest.mark.parametrize("fields", [{}, {"side": "input"}, {"lora_alpha": 9.0}, {"basis": "lora"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_load_lora_adapter_and_set_adapters(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    ours, files = two_adapters(kind, tmp_path, **fields)
    given = inputs(kind)
    set_adapters(ours, WEIGHTS)
    stock: Any = tiny(kind)
    base = output(stock, given)
    for name, path in files.items():
        stock.load_lora_adapter(str(path), prefix=PREFIXES[kind], adapter_name=name)
    stock.set_adapters(list(WEIGHTS), list(WEIGHTS.values()))
    assert close(output(stock, given), output(ours, given))
    assert not close(output(ours, given), base, 1e-3)
    stock.disable_adapters()
    assert torch.equal(output(stock, given), base)


def test_flux_pipeline_load_lora_weights(tmp_path: Path) -> None:
    pipeline: FluxPipeline = flux_pipeline()
    given = dict(flux_inputs())
    given["hidden_states"] = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    files = {}
    for seed, name in enumerate(WEIGHTS):
        add_adapter(pipeline.transformer, spec_for("flux", seed=seed), name)
        shake(pipeline.transformer, name, seed=seed)
        files[name] = save_adapter(pipeline.transformer, name, tmp_path / f"{name}.safetensors")
    set_adapters(pipeline.transformer, WEIGHTS)
    expected = output(pipeline.transformer, given)
    stock: Any = flux_pipeline()
    for name, path in files.items():
        stock.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    stock.set_adapters(list(WEIGHTS), list(WEIGHTS.values()))
    assert close(output(stock.transformer, given), expected)
    stock.fuse_lora()
    stock.unload_lora_weights()
    assert close(output(stock.transformer, given), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_model_from_pretrained(kind: str, tmp_path: Path) -> None:
    ours, _ = two_adapters(kind, tmp_path)
    given = inputs(kind)
    set_adapters(ours, {"content": 1.0})
    folder = write_peft_folder(adapter_of(ours, "content"), tmp_path / "peft")
    base_model: Any = tiny(kind)
    weights = {key: value.clone() for key, value in base_model.state_dict().items()}
    stock = PeftModel.from_pretrained(base_model, str(folder))
    assert close(output(stock.base_model.model, given), output(ours, given))
    now = {key.replace(".base_layer", ""): value for key, value in base_model.state_dict().items()}
    assert all(torch.equal(now[key], value) for key, value in weights.items())


@pytest.mark.parametrize("fields", [{}, {"basis": "lora"}, {"side": "input", "lora_alpha": 3.0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_file_is_both_adapters_at_their_weights(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    ours, _ = two_adapters(kind, tmp_path, **fields)
    given = inputs(kind)
    set_adapters(ours, WEIGHTS)
    parts = [adapter_of(ours, name) for name in WEIGHTS]
    method = "concat" if fields.get("basis") == "lora" else "sum"
    merged = merge(parts, list(WEIGHTS.values()), method)
    for layer, pair in merged.layers.items():
        total = 0.9 * dense(parts[0], layer) + dense(parts[1], layer)
        got = pair.B.double().flatten(1) @ pair.A.double().flatten(1)
        assert relative(got, total) < 1e-6
    path = merged.save(tmp_path / "both.safetensors")
    stock: Any = tiny(kind)
    stock.load_lora_adapter(str(path), prefix=PREFIXES[kind], adapter_name="both")
    assert close(output(stock, given), output(ours, given))
    again = tiny(kind)
    attach_adapter(again, merged, "both")
    assert close(output(again, given), output(ours, given))


def test_bf16_files_load_into_bf16_models(tmp_path: Path) -> None:
    denoiser = tiny_flux()
    add_adapter(denoiser, AdapterSpec(rank=6, target_modules=["attn.to_q", "attn.to_v"]), "content")
    shake(denoiser, "content")
    path = save_adapter(denoiser, "content", tmp_path / "a.safetensors", save_dtype="bf16")
    stock: Any = tiny_flux().to(torch.bfloat16)
    stock.load_lora_adapter(str(path), prefix="transformer", adapter_name="content")
    assert close(output(stock, flux_inputs()), output(denoiser, flux_inputs()), 3e-2)
