"""Text encoders trained together with the denoiser, on tiny models of every family."""

import copy
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qrlora.adapter import (
    attach_to_pipeline,
    remove_from_pipeline,
    set_pipeline_adapters,
    target_layers,
    trainable_parameters,
)
from qrlora.blend import Painter
from qrlora.data import Encoded
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, read_adapter
from qrlora.models import LoadedModel, load_pipeline
from qrlora.training import Interrupted, TrainConfig, train
from qrlora.training import run as running
from qrlora.training.setup import ADAPTER_NAME
from qrlora.training.words import Words
from tests.adapter.test_text_encoders import ENCODERS, adapt, close, latents
from tests.training.conftest import MakeConfig

# peft warns whenever a second adapter is loaded; every other warning is an error.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
KINDS = ("flux", "sd3", "sdxl")
Make = Callable[..., TrainConfig]
STEP = 0.03


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(kind: str, request: pytest.FixtureRequest) -> LoadedModel:
    return load_pipeline(request.getfixturevalue(f"tiny_{kind}"))


@pytest.fixture
def make(make_config: MakeConfig, tmp_path: Path) -> Make:
    def made(**changes: Any) -> TrainConfig:
        return make_config(**({"train_text_encoder": True, "max_train_steps": 3, "checkpointing_steps": 10} | changes))

    return made


def run(config: TrainConfig, model: LoadedModel | None = None, **more: Any) -> Adapter:
    return read_adapter(train(config, loaded=model, progress=False, **more).path)


def base_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key.replace(".base_layer", ""): value for key, value in module.state_dict().items()}


def trained(adapter: Adapter) -> dict[str, Tensor]:
    """All factors by component and layer."""
    return {
        f"{component}.{name}.{factor}": getattr(pair, factor)
        for component, part in adapter.components.items()
        for name, pair in part.layers.items()
        for factor in "AB"
    }


def equal(one: Adapter, other: Adapter) -> bool:
    first, second = trained(one), trained(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("options", [{}, {"adapter": {"basis": "lora"}, "use_ema": True}], ids=["qr", "lora, average"])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    loaded: LoadedModel, make: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    encoders = [getattr(loaded.pipeline, name) for name in ENCODERS[loaded.family.name]]
    before = [copy.deepcopy(base_weights(encoder)) for encoder in encoders]
    whole = train(make(**options, output_dir=str(tmp_path / "whole")), loaded=loaded, progress=False).path

    def interrupt(done: int, _total: int) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(make(**options), loaded, on_step=interrupt)
    resumed = train(make(**options, resume="latest"), loaded=loaded, progress=False).path
    assert resumed.read_bytes() == whole.read_bytes()
    both = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "out")]
    assert both[0] == both[1]
    adapter = read_adapter(whole)
    assert list(adapter.companions) == list(ENCODERS[loaded.family.name])
    moved = {key for key, tensor in trained(adapter).items() if tensor.any() and key.endswith("A")}
    for component in adapter.companions:
        assert any(key.startswith(component) for key in moved)
    # Their base weights are what they were, and nothing of ours is left.
    for encoder, weights in zip(encoders, before, strict=True):
        now = base_weights(encoder)
        assert now.keys() == weights.keys()
        assert all(torch.equal(now[key], value) for key, value in weights.items())
        assert not getattr(encoder, "peft_config", None)


def test_the_file_is_read_by_stock_diffusers(loaded: LoadedModel, make: Make) -> None:
    result = train(make(learning_rate=0.2), loaded=loaded, progress=False)
    adapter = read_adapter(result.path)
    assert result.parameters == sum(
        pair.A.numel() - 6 for part in adapter.components.values() for pair in part.layers.values()
    )
    stock, ours = load_pipeline(loaded.source or "").pipeline, load_pipeline(loaded.source or "").pipeline
    base = latents(ours)
    stock.load_lora_weights(str(result.path.parent), weight_name=result.path.name, adapter_name="ours")
    attach_to_pipeline(ours, adapter, "ours")
    assert close(latents(stock), latents(ours))
    assert not close(latents(ours), base, 1e-2)
    set_pipeline_adapters(ours, {})
    assert torch.equal(latents(ours), base)
    for companion in adapter.companions.values():
        assert companion.header is not None
        assert (companion.header.base_model, companion.header.trigger_words) == (loaded.model_id, ["<c>"])


def test_prompts_are_read_as_the_pipeline_reads_them(loaded: LoadedModel, kind: str) -> None:
    """With and without an adapter, and without the encoders that are not trained."""
    pipeline, family, prompts = loaded.pipeline, loaded.family, ["a <c> dog", "a cat"]
    length, negative = loaded.defaults.max_sequence_length, loaded.defaults.negative_prompt
    cached, against = (
        family.encode_prompts(pipeline, prompts, length),
        family.encode_negative(pipeline, negative, length),
    )
    attach_to_pipeline(pipeline, adapt(kind, load_pipeline(loaded.source or "").pipeline, "words"), "words")
    try:
        for weights in ({}, {"words": 1.0}):
            set_pipeline_adapters(pipeline, weights)
            wanted = family.encode_prompts(pipeline, prompts, length)
            unwanted = family.encode_negative(pipeline, negative, length)
            others = set(family.text_components) - set(family.trainable_encoders)
            there = {name: getattr(pipeline, name) for name in others}
            for name in others:
                setattr(pipeline, name, None)
            now, not_now = (
                family.encode_again(pipeline, prompts, cached),
                family.encode_negative_again(pipeline, negative, against),
            )
            for name, module in there.items():
                setattr(pipeline, name, module)
            assert all(torch.equal(now[key], rows) for key, rows in wanted.items())
            assert all(torch.equal(not_now[key], rows) for key, rows in unwanted.items())
        assert not torch.equal(wanted["pooled_prompt_embeds"], cached["pooled_prompt_embeds"])
    finally:
        remove_from_pipeline(pipeline, "words")


def test_gradients_are_those_of_the_loss(loaded: LoadedModel, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against differences of the loss along each encoder's gradient."""
    ratios: list[float] = []

    def look(*_: Any) -> None:
        for component in loaded.family.trainable_encoders:
            every = found[0].parameters.items()
            ours = {key: p for key, p in every if key.startswith(f"{component}.") and p.grad is not None}
            slope = sum(float(p.grad.square().sum()) for p in ours.values()) ** 0.5
            start, values = {key: p.data.clone() for key, p in ours.items()}, list[float]()
            for step in (STEP, -STEP):
                for key, p in ours.items():
                    p.data.copy_(start[key] + step / slope * p.grad)
                with torch.no_grad():
                    values.append(float(found[0]._loss(0)))
            for key, p in ours.items():
                p.data.copy_(start[key])
            ratios.append((values[0] - values[1]) / (2 * STEP) / slope)

    found: list[Any] = []
    real = running.Run.__post_init__
    monkeypatch.setattr(running.Run, "__post_init__", lambda self: found.append(self) or real(self))
    monkeypatch.setattr(running, "set_rates", look)
    # No clipping, which would scale the gradients.
    run(make(max_train_steps=1, adapter={"init": "normal", "init_std": 0.3}, max_grad_norm=1e9), loaded)
    assert ratios == pytest.approx([1.0] * len(loaded.family.trainable_encoders), rel=2e-2)


def test_each_group_has_its_own_rate(loaded: LoadedModel, make: Make, tmp_path: Path) -> None:
    """Adam's first step moves every coefficient with a gradient by the learning rate."""
    for rates in ({"text_encoder_lr": 1e-3}, {}):
        config = make(max_train_steps=1, learning_rate=0.02, overwrite=True, adam_epsilon=1e-16, **rates)
        adapter = run(config, loaded)
        for component, part in adapter.components.items():
            largest = max(float(pair.A.abs().max()) for pair in part.layers.values())
            wanted = rates.get("text_encoder_lr", 0.02) if component in adapter.companions else 0.02
            assert largest == pytest.approx(wanted, rel=1e-4)
    resolved = TrainConfig.from_yaml(tmp_path / "out" / "config.yaml")
    assert (resolved.train_text_encoder, resolved.text_encoder_lr) == (True, 0.02)


def test_schedules_and_clipping_are_over_all(
    loaded: LoadedModel, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    real = running.set_rates

    def spy(config: TrainConfig, optimiser: torch.optim.Optimizer, rate: float) -> None:
        real(config, optimiser, rate)
        rates.append([group["lr"] for group in optimiser.param_groups])
        norms.append(
            [
                sum(float(p.grad.square().sum()) for p in group["params"] if p.grad is not None) ** 0.5
                for group in optimiser.param_groups
            ]
        )

    norms: list[list[float]] = []
    monkeypatch.setattr(running, "set_rates", spy)
    more = {"lr_scheduler": "linear", "text_encoder_lr": 4e-3, "max_grad_norm": 1e-3, "learning_rate": 1e-2}
    run(make(**more), loaded)
    assert rates == [pytest.approx([1e-2 * (1 - step / 3), 4e-3 * (1 - step / 3)]) for step in range(3)]
    assert [sum(norm**2 for norm in both) ** 0.5 for both in norms] == pytest.approx([1e-3] * 3, rel=1e-3)
    assert all(min(both) > 0 for both in norms)
    told = json.loads((tmp_path / "out" / "losses.json").read_text())
    plain = train(make(train_text_encoder=False, output_dir=str(tmp_path / "plain")), loaded=loaded, progress=False)
    # At the start nothing is changed, with text encoders or without.
    assert told["loss"][0] == pytest.approx(plain.losses[0], rel=1e-6)
    alone = json.loads((tmp_path / "plain" / "losses.json").read_text())["grad_norm"][0]
    assert told["grad_norm"][0] > alone


def test_a_caption_is_read_once_a_batch(loaded: LoadedModel) -> None:
    pipeline, family = loaded.pipeline, loaded.family
    captions = ("a <c> dog", "a cat", "ink")
    cached = family.encode_prompts(pipeline, captions, loaded.defaults.max_sequence_length)
    encoded = Encoded((), cached, "", captions=captions)
    drawn = running.Draw(0, torch.tensor([4, 0, 9]), torch.tensor([2, 0, 2]), *[torch.zeros(3)] * 2, None)
    again, rows = Words(family, pipeline, torch.device("cpu")).read(encoded, drawn)
    assert {len(value) for value in again.conditioning.values()} == {2}
    for key, value in again.conditioning.items():
        torch.testing.assert_close(value[rows.captions], cached[key][drawn.captions], rtol=0, atol=1e-6)
    assert torch.equal(rows.rows, drawn.rows)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"encoder_offload": "blocks"}], ids=str)
def test_ways_to_save_memory_change_no_bit(
    loaded: LoadedModel, make: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = {"model": loaded.source}
    plain = run(make(**model))
    assert equal(run(make(**model, **options, output_dir=str(tmp_path / "less"))), plain)


def test_streamed_blocks_pass_gradients_to_the_words(loaded: LoadedModel, make: Make, tmp_path: Path) -> None:
    """Gradients of the prompt are summed over the blocks in another order, so they differ by rounding."""
    for name, options in (("plain", {}), ("less", {"offload": "blocks"})):
        run(make(model=loaded.source, learning_rate=1e-4, **options, output_dir=str(tmp_path / name)))
    plain, less = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("plain", "less"))
    assert less["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert less["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_denoiser_passes_gradients_to_the_words(
    loaded: LoadedModel, make: Make, tmp_path: Path, quantization: str
) -> None:
    options = {"model": loaded.source, "quantization": quantization, "learning_rate": 0.02}
    whole = run(make(**options))
    again = run(make(**options, output_dir=str(tmp_path / "again")))
    assert equal(whole, again)
    for companion in whole.companions.values():
        assert any(bool(pair.A.any()) for pair in companion.layers.values())


def test_bf16_with_validation(loaded: LoadedModel, make: Make) -> None:
    config = make(model=loaded.source, mixed_precision="bf16", validation_prompt="a <c> cat", validation_steps=2)
    adapter = run(config)
    for companion in adapter.companions.values():
        pair = companion.layers[target_layers(getattr(loaded.pipeline, companion.component))[0]]
        assert not torch.equal(pair.A, pair.A.bfloat16().float())
        assert companion.header is not None
        assert all(value.startswith("bfloat16:") for value in companion.header.weight_hashes.values())


def test_validation_reads_with_the_trained_encoders(loaded: LoadedModel, make: Make, tmp_path: Path) -> None:
    plain = run(make(learning_rate=0.2, output_dir=str(tmp_path / "plain")), loaded)
    options = {"validation_prompt": "a <c> cat", "validation_steps": 3, "learning_rate": 0.2}
    adapter = run(make(**options), loaded)
    assert equal(adapter, plain)
    painter = Painter(load_pipeline(loaded.source or ""), None, loaded.defaults)
    with Image.open(tmp_path / "out" / "validation" / "step-000003-0.png") as picture:
        shown = np.asarray(picture).astype(int)
    drawn = {}
    for name, part in (("whole", adapter), ("bare", adapter.alone())):
        painter.attach(name, part.save(tmp_path / f"{name}.safetensors"))
        drawn[name] = np.asarray(painter.paint("a <c> cat", 0, {name: 1.0}).image).astype(int)
    assert np.abs(drawn["whole"] - shown).max() <= 1
    assert np.abs(drawn["bare"] - shown).max() > 1


def test_the_prior_is_read_with_them_too(loaded: LoadedModel, make: Make, tmp_path: Path) -> None:
    config = make(
        with_prior_preservation=True,
        class_data_dir=str(tmp_path / "class"),
        class_prompt="a dog",
        num_class_images=2,
        max_train_steps=2,
    )
    whole = run(config, loaded)
    again = run(config.model_copy(update={"output_dir": str(tmp_path / "again")}), loaded)
    assert equal(whole, again)


def test_what_the_caller_has_on_the_encoders_is_not_in_the_way(
    loaded: LoadedModel, kind: str, make: Make, tmp_path: Path
) -> None:
    expected = run(make(), loaded)
    pipeline = loaded.pipeline
    attach_to_pipeline(pipeline, adapt(kind, load_pipeline(loaded.source or "").pipeline, "mine"), "mine")
    try:
        set_pipeline_adapters(pipeline, {"mine": 0.7})
        before = latents(pipeline)
        assert equal(run(make(output_dir=str(tmp_path / "with")), loaded), expected)
        assert torch.equal(latents(pipeline), before)
        # Also where the encoders are not trained, and would be freed.
        run(make(train_text_encoder=False, output_dir=str(tmp_path / "plain")), loaded)
        assert torch.equal(latents(pipeline), before)
    finally:
        remove_from_pipeline(pipeline, "mine")


def test_starting_from_an_adapter(loaded: LoadedModel, make: Make, tmp_path: Path) -> None:
    first = train(make(), loaded=loaded, progress=False).path
    with pytest.raises(
        QrloraError, match=r"init_from: .* has an adapter of text_encoder.* too; set train_text_encoder"
    ):
        run(make(train_text_encoder=False, init_from=str(first), output_dir=str(tmp_path / "no")), loaded)
    still = {"learning_rate": 1e-12, "max_train_steps": 1, "seed": 9}
    second = run(make(init_from=str(first), output_dir=str(tmp_path / "second"), **still), loaded)
    start = trained(read_adapter(first))
    for key, tensor in trained(second).items():
        torch.testing.assert_close(tensor, start[key], rtol=0, atol=1e-9)
    bare = read_adapter(first).alone().save(tmp_path / "bare.safetensors")
    third = run(make(init_from=str(bare), output_dir=str(tmp_path / "third"), **still), loaded)
    for companion in third.companions.values():  # new ones
        assert all(float(pair.A.abs().max()) < 1e-9 for pair in companion.layers.values())
    assert not (tmp_path / "no").exists()


def test_initial_encoders_that_do_not_fit(tiny_sdxl: Path, make: Make, tmp_path: Path) -> None:
    model = load_pipeline(tiny_sdxl)
    path = train(make(max_train_steps=1), loaded=model, progress=False).path
    adapter = read_adapter(path)
    words = adapter.companions["text_encoder"]
    smaller = {name: type(pair)(pair.B[:, :2], pair.A[:2]) for name, pair in words.layers.items()}
    lower, whole = (words.header and words.header.model_copy(update=each) for each in ({"rank": 2}, {"mask": "full"}))
    for layers, header, message in (
        (smaller, lower, r"has rank 2 for text_encoder, but adapter\.rank is 4"),
        (words.layers, whole, "mask 'full' for text_enc"),
        (
            dict(list(words.layers.items())[1:]),
            words.header,
            "does not adapt .*self_attn.* of text_encoder, other than",
        ),
    ):
        odd = Adapter(layers, header, "text_encoder")
        start = Adapter(adapter.layers, adapter.header, "unet", companions={"text_encoder": odd})
        start.save(tmp_path / "start.safetensors")
        with pytest.raises(QrloraError, match=message):
            run(make(init_from=str(tmp_path / "start.safetensors"), output_dir=str(tmp_path / "no")), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_text_encoder": False, "text_encoder_lr": 1e-5}, "text_encoder_lr=1e-05 is of text encoders that are"),
        ({"optimizer": "prodigy", "text_encoder_lr": 0.5}, "prodigy takes one learning_rate for all"),
        ({"adapter": {"basis": "dora"}}, r"adapter\.form='dora' is for denoisers"),
        ({"adapter": {"experts": 4}}, r"adapter\.form='gated' is for denoisers"),
    ],
)
def test_contradictions_are_told(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QrloraError, match=message):
        make(**changes)


def test_other_encoders_are_another_run(tiny_flux: Path, make: Make) -> None:
    model = load_pipeline(tiny_flux)
    run(make(checkpointing_steps=2), model)
    for changes in ({"train_text_encoder": False}, {"text_encoder_lr": 1e-5}):
        with pytest.raises(
            QrloraError, match=r"cannot resume from .*: text_encoder_lr differs from that run \(0\.01 t"
        ):
            run(make(max_train_steps=6, resume="latest", **changes), model)


def test_where_no_encoder_can_be_trained(tiny_flux: Path, make: Make) -> None:
    model = load_pipeline(tiny_flux)
    model.pipeline.text_encoder = None
    with pytest.raises(QrloraError, match=r"tiny-flux \(flux\) has no text_encoder to train"):
        run(make(), model)


def test_prodigy_finds_one_rate_for_all(tiny_flux: Path, make: Make, tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")
    model = load_pipeline(tiny_flux)
    options = {"optimizer": "prodigy", "learning_rate": 1.0, "checkpointing_steps": 2}
    whole = train(make(**options, output_dir=str(tmp_path / "whole")), loaded=model, progress=False).path
    resumed = make(**options, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert train(resumed, loaded=model, progress=False).path.read_bytes() == whole.read_bytes()


def test_frozen_encoders_stay_frozen(tiny_sdxl: Path, make: Make) -> None:
    """An adapter on the encoders has nothing to train that the run does not know."""
    model, seen = load_pipeline(tiny_sdxl), list[set[str]]()

    def look(done: int, _total: int) -> None:
        for name in ENCODERS["sdxl"]:
            encoder = getattr(model.pipeline, name)
            wanting = {id(parameter) for parameter in encoder.parameters() if parameter.requires_grad}
            assert wanting == {id(each) for each in trainable_parameters(encoder, ADAPTER_NAME).values()}
            seen.append({name})

    run(make(max_train_steps=1), model, on_step=look)
    assert seen == [{"text_encoder"}, {"text_encoder_2"}]
