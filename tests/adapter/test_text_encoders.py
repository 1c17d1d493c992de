"""Adapters of CLIP text encoders, alone and as companions of a denoiser's, on real pipelines and in stock diffusers."""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from qrlora.adapter import (
    AdapterSpec,
    _pipeline,
    adapter_of,
    adapter_of_pipeline,
    adapters_disabled,
    add_adapter,
    attach_adapter,
    attach_to_pipeline,
    check_fits_pipeline,
    pipeline_adapter_names,
    pipeline_adapters_disabled,
    remove_adapter,
    remove_from_pipeline,
    set_adapters,
    set_pipeline_adapters,
    target_layers,
    text_encoders_with,
    trainable_parameters,
)
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, read_adapter, write_adapter
from qrlora.merging import merge
from tests.adapter.test_add_adapter import shake
from tests.tiny_pipelines import flux_pipeline, sd3_pipeline, sdxl_pipeline

# peft warns whenever a second adapter is loaded; every other warning is an error.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
MAKERS: dict[str, Callable[[], Any]] = {"flux": flux_pipeline, "sd3": sd3_pipeline, "sdxl": sdxl_pipeline}
ENCODERS = {
    "flux": ("text_encoder",),
    "sd3": ("text_encoder", "text_encoder_2"),
    "sdxl": ("text_encoder", "text_encoder_2"),
}
WEIGHTS = {"content": 0.9, "style": 1.1}
FIRST = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(params=MAKERS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with warnings.catch_warnings():
        # Of transformers, at the tiny text encoders' loading by stock diffusers.
        warnings.simplefilter("ignore", FutureWarning)
        yield request.param


def tiny(kind: str) -> Any:
    """A pipeline frozen as `load_pipeline` does it: torch multiplies weights that want gradients in another order."""
    pipeline = MAKERS[kind]()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    return pipeline


def denoiser_of(pipeline: Any) -> Any:
    return getattr(pipeline, "transformer", None) or pipeline.unet


def latents(pipeline: Any) -> Tensor:
    """Two steps of the stock pipeline from a prompt, encoders and all."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt="a <c> dog",
        height=32,
        width=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def adapt(kind: str, pipeline: Any, name: str, seed: int = 0, **fields: Any) -> Adapter:
    """An adapter with values on the denoiser and on the encoders."""
    parts = (denoiser_of(pipeline), *(getattr(pipeline, encoder) for encoder in ENCODERS[kind]))
    for index, module in enumerate(parts):
        add_adapter(module, AdapterSpec(**({"rank": 4, "seed": seed} | fields)), name)
        shake(module, name, 0.3, seed=10 * seed + index)
    return adapter_of_pipeline(pipeline, name, base_model="tiny", trigger_words=["<c>"], training={"steps": 3})


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return float((one.double() - other.double()).norm() / other.double().norm()) < tolerance


@pytest.mark.parametrize("fields", [{}, {"side": "input", "lora_alpha": 9.0}, {"basis": "lora"}], ids=str)
def test_a_file_loads_in_stock_diffusers_with_every_component(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    ours = tiny(kind)
    base = latents(ours)
    adapters = {name: adapt(kind, ours, name, seed, **fields) for seed, name in enumerate(WEIGHTS)}
    set_pipeline_adapters(ours, WEIGHTS)
    expected = latents(ours)
    stock = tiny(kind)
    for name, adapter in adapters.items():
        path = adapter.save(tmp_path / f"{name}.safetensors")
        stock.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name=name)
    component = adapters["content"].component
    assert set(stock.get_list_adapters()) == {component, *ENCODERS[kind]}
    stock.set_adapters(list(WEIGHTS), list(WEIGHTS.values()))
    assert close(latents(stock), expected)
    assert not close(expected, base, 1e-2)
    with pipeline_adapters_disabled(ours):
        assert torch.equal(latents(ours), base)
    # The encoders' part is not too small to be missed.
    for encoder in ENCODERS[kind]:
        set_adapters(getattr(ours, encoder), {"content": 0.0})
    assert not close(latents(ours), expected, 1e-4)


def test_what_is_written_is_read_back_and_attached(kind: str, tmp_path: Path) -> None:
    ours = tiny(kind)
    base = latents(ours)
    adapter = adapt(kind, ours, "content")
    expected = latents(ours)
    path = adapter.save(tmp_path / "a.safetensors")
    again = read_adapter(path)
    assert list(again.companions) == list(ENCODERS[kind])
    for component, part in again.components.items():
        mine = adapter.components[component]
        assert (part.header, part.component) == (mine.header, component)
        assert set(part.layers) == set(mine.layers)
        assert all(torch.equal(part.layers[name].A, pair.A) for name, pair in mine.layers.items())
        assert all(torch.equal(part.layers[name].B, pair.B) for name, pair in mine.layers.items())
    companion = again.companions["text_encoder"]
    assert FIRST in companion.layers
    assert len(companion.layers) == 4 * len({name.split(".")[3] for name in companion.layers})
    assert companion.header is not None
    assert set(companion.header.weight_hashes) == set(companion.layers)
    assert again.header is not None
    assert (again.header.training, companion.header.training) == ({"steps": 3}, None)
    other = tiny(kind)
    layers = attach_to_pipeline(other, again, "again")
    assert list(layers) == [adapter.component, *ENCODERS[kind]]
    assert torch.equal(latents(other), expected)
    assert text_encoders_with(other, ["again"]) == ("again",)
    set_pipeline_adapters(other, {"again": 0.5})
    halved = latents(other)
    third = tiny(kind)
    attach_to_pipeline(third, again.scaled(0.5), "halved")
    assert close(latents(third), halved)
    set_pipeline_adapters(other, {})
    assert torch.equal(latents(other), base)
    remove_from_pipeline(other, "again")
    assert torch.equal(latents(other), base)
    attach_to_pipeline(other, again, "again")
    assert torch.equal(latents(other), expected)


def test_a_merge_is_both_adapters_at_their_weights(kind: str) -> None:
    ours = tiny(kind)
    parts = [adapt(kind, ours, name, seed) for seed, name in enumerate(WEIGHTS)]
    set_pipeline_adapters(ours, WEIGHTS)
    merged = merge(parts, list(WEIGHTS.values()), "sum")
    again = tiny(kind)
    attach_to_pipeline(again, merged, "both")
    assert close(latents(again), latents(ours))
    assert {pair.rank for part in merged.components.values() for pair in part.layers.values()} == {4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_is_adapted_as_a_denoiser_is(dtype: torch.dtype) -> None:
    encoder: Any = tiny("flux").text_encoder.to(dtype)
    given = torch.tensor([[0, 5, 6, 7, 1, 1]])
    base, weights = encoder(given).pooler_output.detach(), copy.deepcopy(encoder.state_dict())
    add_adapter(encoder, AdapterSpec(rank=4), "content")
    assert torch.equal(encoder(given).pooler_output, base)
    encoder(given).pooler_output.float().square().mean().backward()
    parameters = trainable_parameters(encoder, "content")
    assert set(parameters) == {
        f"text_model.encoder.layers.0.self_attn.{name}_proj.lora_A.weight" for name in ("q", "k", "v", "out")
    }
    assert all(parameter.grad is not None and parameter.dtype == torch.float32 for parameter in parameters.values())
    assert not bool(parameters[f"{FIRST}.lora_A.weight"].grad.tril(-1).any())
    shake(encoder, "content", 0.3)
    adapted = encoder(given).pooler_output.detach()
    assert not torch.equal(adapted, base)
    with adapters_disabled(encoder):
        assert torch.equal(encoder(given).pooler_output, base)
    adapter = adapter_of(encoder, "content")
    assert adapter.component == "text_encoder"
    attach_adapter(encoder, adapter, "again")
    set_adapters(encoder, {"again": 1.0})
    assert torch.equal(encoder(given).pooler_output, adapted)
    for name in ("content", "again"):
        remove_adapter(encoder, name)
    assert torch.equal(encoder(given).pooler_output, base)
    now = {key.replace(".base_layer", ""): value for key, value in encoder.state_dict().items()}
    assert all(torch.equal(now[key], value) for key, value in weights.items())


def test_paths_are_the_same_whether_a_model_is_flattened_or_not() -> None:
    pipeline = tiny("sdxl")
    flat, whole = (target_layers(encoder) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2))
    assert flat == whole
    assert flat[:4] == [f"text_model.encoder.layers.0.self_attn.{each}_proj" for each in ("k", "v", "q", "out")]


def test_an_adapter_of_an_encoder_alone_has_a_file_too(tmp_path: Path) -> None:
    ours = tiny("sdxl")
    for encoder in (ours.text_encoder, ours.text_encoder_2):
        add_adapter(encoder, AdapterSpec(rank=4), "words")
        shake(encoder, "words", 0.3)
    adapter = adapter_of_pipeline(ours, "words")
    assert (adapter.component, list(adapter.companions)) == ("text_encoder", ["text_encoder_2"])
    path = adapter.save(tmp_path / "a.safetensors")
    again = read_adapter(path)
    assert (again.header, list(again.companions)) == (adapter.header, ["text_encoder_2"])
    other = tiny("sdxl")
    attach_to_pipeline(other, again, "words")
    assert torch.equal(latents(other), latents(ours))
    assert text_encoders_with(other, ["words"]) == ("words",)
    with pytest.raises(QrloraError, match="adapts a text_encoder, but UNet2DConditionModel is a unet"):
        attach_adapter(other.unet, again, "content")
    with pytest.raises(QrloraError, match="adapts text encoders alone"):
        write_adapter(again, tmp_path / "k.safetensors", "kohya")


def test_an_adapter_without_companions_leaves_the_encoders_alone() -> None:
    pipeline = tiny("flux")
    with_words = adapt("flux", pipeline, "content")
    without = adapter_of(pipeline.transformer, "content")
    attach_to_pipeline(pipeline, without, "plain")
    assert text_encoders_with(pipeline, ["plain", "content"]) == ("content",)
    set_pipeline_adapters(pipeline, {"plain": 1.0})
    other = tiny("flux")
    attach_to_pipeline(other, with_words.alone(), "alone")
    assert torch.equal(latents(pipeline), latents(other))


def test_refusals_name_the_component_and_change_nothing(tmp_path: Path) -> None:
    pipeline = tiny("flux")
    base = latents(pipeline)
    adapter = adapt("flux", tiny("flux"), "content")
    less = tiny("flux")
    less.text_encoder = None
    with pytest.raises(QrloraError, match="the adapter adapts the text_encoder, which this FluxPipeline does not have"):
        attach_to_pipeline(less, adapter, "content")
    with pytest.raises(QrloraError, match="adapts a transformer, but UNet2DConditionModel is a unet"):
        check_fits_pipeline(tiny("sdxl"), adapter)
    companion = adapter.companions["text_encoder"]
    other = {name.replace("layers.0", "layers.7"): pair for name, pair in companion.layers.items()}
    deeper = replace(adapter, companions={"text_encoder": replace(companion, layers=other)})
    with pytest.raises(QrloraError, match=r"layers\.7.*which CLIPTextModel does not have"):
        attach_to_pipeline(pipeline, deeper, "content")
    with torch.no_grad():
        moved = tiny("flux")
        moved.text_encoder.encoder.layers[0].self_attn.q_proj.weight.mul_(1.01)
    with pytest.raises(QrloraError, match=f"another base model: the weight of {FIRST} differs"):
        attach_to_pipeline(moved, adapter, "content")
    attach_adapter(pipeline.text_encoder, companion, "taken")
    with pytest.raises(QrloraError, match="already an adapter 'taken'"):
        attach_to_pipeline(pipeline, adapter, "taken")
    remove_from_pipeline(pipeline, "taken")
    for what in (
        lambda: set_pipeline_adapters(pipeline, {"content": 1.0}),
        lambda: remove_from_pipeline(pipeline, "content"),
        lambda: adapter_of_pipeline(pipeline, "content"),
    ):
        with pytest.raises(QrloraError, match="there is no adapter 'content' on the pipeline; there are: none"):
            what()
    assert torch.equal(latents(pipeline), base)
    with pytest.raises(QrloraError, match="form='dora' is for denoisers"):
        add_adapter(pipeline.text_encoder, AdapterSpec(rank=4, basis="dora"), "content")
    with pytest.raises(QrloraError, match="Linear is not a diffusers denoiser that takes adapters; pass"):
        add_adapter(torch.nn.Linear(3, 3), AdapterSpec(rank=4), "content")


def test_an_attachment_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny("flux")
    adapter = adapt("flux", tiny("flux"), "content")
    attach_to_pipeline(pipeline, adapter, "first")
    before = latents(pipeline)
    real = _pipeline.attach_adapter

    def failing(module: Any, part: Adapter, name: str, **fields: Any) -> list[str]:
        layers = real(module, part, name, **fields)
        if part.component == "text_encoder":
            raise KeyboardInterrupt
        return layers

    monkeypatch.setattr(_pipeline, "attach_adapter", failing)
    with pytest.raises(KeyboardInterrupt):
        attach_to_pipeline(pipeline, adapter, "second")
    assert pipeline_adapter_names(pipeline) == ("first",)
    assert torch.equal(latents(pipeline), before)
    fresh = tiny("flux")
    base = latents(fresh)
    with pytest.raises(KeyboardInterrupt):
        attach_to_pipeline(fresh, adapter, "second")
    assert pipeline_adapter_names(fresh) == ()
    assert torch.equal(latents(fresh), base)


def test_a_name_is_new_on_the_whole_pipeline_and_forms_are_checked_before() -> None:
    pipeline = tiny("flux")
    adapter = adapt("flux", tiny("flux"), "content")
    attach_adapter(pipeline.text_encoder, adapter.companions["text_encoder"], "taken")
    with pytest.raises(QrloraError, match="already an adapter 'taken'"):
        attach_to_pipeline(pipeline, adapter.alone(), "taken")
    assert adapter.header is not None
    unknown = replace(adapter, header=adapter.header.model_copy(update={"form": "newer"}))
    with pytest.raises(QrloraError, match="of the form 'newer', and known are"):
        check_fits_pipeline(pipeline, unknown)


@pytest.mark.parametrize("spelling", ["peft", "before peft"])
def test_files_of_diffusers_own_writer(kind: str, spelling: str, tmp_path: Path) -> None:
    """Plain LoRA put on by stock diffusers and transformers, and saved by the stock pipeline."""
    theirs = tiny(kind)
    parts = {name: getattr(theirs, name) for name in ("transformer", "unet", *ENCODERS[kind]) if hasattr(theirs, name)}
    layers: dict[str, Any] = {}
    for index, (name, module) in enumerate(parts.items()):
        targets = ["q_proj", "out_proj", "fc1"] if "encoder" in name else ["to_q", "to_out.0"]
        # Files of the old spelling do not say alpha.
        config = LoraConfig(r=3, lora_alpha=6 if spelling == "peft" else 3, target_modules=targets)
        module.add_adapter(config, "theirs")
        generator = torch.Generator().manual_seed(index)
        for key, parameter in module.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        state = get_peft_model_state_dict(module, adapter_name="theirs")
        layers[f"{name}_lora_layers"] = state if spelling == "peft" else convert_state_dict_to_diffusers(state)
        if spelling == "peft":
            layers[f"{name}_lora_adapter_metadata"] = module.peft_config["theirs"].to_dict()
    expected = latents(theirs)
    theirs.save_lora_weights(tmp_path, **layers)
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert list(adapter.components) == list(parts)
    ours = tiny(kind)
    attach_to_pipeline(ours, adapter, "theirs")
    assert close(latents(ours), expected)
    assert not close(expected, latents(tiny(kind)), 1e-2)


def test_our_file_for_kohya_loads_in_stock_diffusers(tmp_path: Path) -> None:
    ours = tiny("sdxl")
    adapter = adapt("sdxl", ours, "content")
    path = write_adapter(adapter, tmp_path / "a.safetensors", "kohya")
    stock = tiny("sdxl")
    stock.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="content")
    assert set(stock.get_list_adapters()) == {"unet", "text_encoder", "text_encoder_2"}
    assert close(latents(stock), latents(ours))
