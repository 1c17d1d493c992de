"""ZipLoRA's mergers: their gradient against a direct dense computation, and what comes of learning them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from qrlora.adapter import (
    AdapterSpec,
    adapter_of,
    add_adapter,
    attach_adapter,
    remove_adapter,
    trainable_parameters,
    zero_masked,
)
from qrlora.errors import QrloraError
from qrlora.formats import Adapter
from qrlora.merging import merge
from qrlora.merging._learn import Learning, batch_at, drawn_pictures, on_model
from qrlora.merging._mergers import joined, overlap
from qrlora.models import LoadedModel, load_pipeline
from tests.adapters_of_data import with_words

CAPTIONS = ("a <c> dog", "a cat in <s> style", "a red hat")
QUICK = {"pictures": 2, "num_inference_steps": 2, "train_batch_size": 2}
HOW = Learning(1, 100.0, 0.0, 0.3, "product", 2, 1.0, 5)
pytestmark = pytest.mark.filterwarnings("ignore:.*times as strong as")


@pytest.fixture(scope="module")
def model(tiny_flux: Path) -> LoadedModel:
    return load_pipeline(tiny_flux)


def adapters_on(model: LoadedModel, count: int = 2, **spec: Any) -> list[Adapter]:
    """As trained with the captions: strong updates, so that adding them up spoils both."""
    found: list[Adapter] = []
    for seed in range(count):
        add_adapter(model.denoiser, AdapterSpec(**({"rank": 4} | spec)), "made")
        generator = torch.Generator().manual_seed(seed)
        parameters = list(trainable_parameters(model.denoiser, "made").values())
        for parameter in parameters:
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        zero_masked(parameters)
        found.append(adapter_of(model.denoiser, "made", training={"captions": [CAPTIONS[seed]]}))
        remove_adapter(model.denoiser, "made")
    return found


def dense(adapter: Adapter, layer: str) -> Tensor:
    pair = adapter.layers[layer]
    return (pair.B.flatten(1).double() @ pair.A.flatten(1).double()).reshape(pair.shape)


@pytest.mark.parametrize(
    ("family", "spec", "penalty"),
    [
        ("tiny_flux", {}, "product"),
        ("tiny_flux", {"basis": "lora"}, "cosine"),
        ("tiny_flux", {"side": "input"}, "product"),
        ("tiny_sd3", {"mask": "full", "target_modules": ["attn.to_q"]}, "product"),
        ("tiny_sdxl", {"basis": "lora", "target_modules": ["to_q", "conv1"]}, "product"),
    ],
)
def test_a_step_is_along_the_dense_gradient(
    family: str, spec: dict[str, Any], penalty: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain descent in AdamW's place, `1 - m` after one step is the rate times the gradient."""
    model = load_pipeline(request.getfixturevalue(family))
    parts, weights = adapters_on(model, **spec), [0.9, 1.2]
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda given, lr, weight_decay: torch.optim.SGD(given, lr=lr, weight_decay=weight_decay)
    )
    learned = merge(
        parts,
        weights,
        "zip",
        model=model,
        steps=1,
        learning_rate=HOW.learning_rate,
        weight_decay=0.0,
        strength=HOW.strength,
        penalty=penalty,
        seed=HOW.seed,
        **QUICK,
    )

    # The same pictures, then everything else anew, on dense weights.
    whole = joined(parts, weights)
    with on_model(model, whole, parts[0].component, {}) as adapter:
        encoded = drawn_pictures(
            model, adapter, whole, [[text] for text in CAPTIONS[:2]], count=2, num_inference_steps=2, seed=HOW.seed
        )
    process, group = model.family.noise_process(model.pipeline), encoded.groups[0]
    batch = batch_at(encoded, process, 2, HOW, 0)
    denoiser = load_pipeline(request.getfixturevalue(family)).denoiser.double()
    base = denoiser.state_dict()
    layers = list(parts[0].layers)
    mergers = {name: torch.ones(2, *dense(parts[0], name).shape[1:]).double() for name in layers}
    for each in mergers.values():
        each.requires_grad_()

    def says(rows: Tensor, factors: dict[str, Sequence[Tensor]]) -> Tensor:
        changed = dict(base)
        for name in layers:
            for part, weight, factor in zip(parts, weights, factors[name], strict=True):
                changed[f"{name}.weight"] = changed[f"{name}.weight"] + weight * dense(part, name) * factor
        noisy = process.noisy(group.latents[rows], batch.noise, batch.index).double()
        told = {key: value[group.caption_rows[rows]].double() for key, value in encoded.conditioning.items()}
        told |= {key: value[rows] for key, value in group.picture_conditioning.items()}

        class Changed(torch.nn.Module):
            config = denoiser.config

            def forward(self, **given: Any) -> Any:
                return functional_call(denoiser, changed, kwargs=given)

        return model.family.predict(Changed(), noisy, process.levels[batch.index], told, 1.0)

    loss = torch.zeros((), dtype=torch.float64)
    for index, rows in enumerate(batch.rows):
        alone = {name: [torch.tensor(float(index == other)).double() for other in range(2)] for name in layers}
        with torch.no_grad():
            teacher = says(rows, alone)
        loss = loss + F.mse_loss(says(rows, {name: list(mergers[name]) for name in layers}), teacher)
    terms = []
    for each in mergers.values():
        one, other = each.flatten(1)
        terms.append(
            (one * other).abs().mean() if penalty == "product" else F.cosine_similarity(one, other, dim=0).abs()
        )
    (loss + HOW.strength * torch.stack(terms).mean()).backward()

    for name in layers:
        assert mergers[name].grad is not None
        after = 1 - HOW.learning_rate * mergers[name].grad
        expected = sum(w * dense(part, name) * own for w, part, own in zip(weights, parts, after, strict=True))
        plain = sum(w * dense(part, name) for w, part in zip(weights, parts, strict=True))
        assert float((expected - plain).norm()) > 1e-3 * float(plain.norm())
        difference = dense(learned, name) - expected
        assert float(difference.norm()) < 2e-3 * float((expected - plain).norm()) + 1e-6 * float(plain.norm()), name


@pytest.mark.parametrize("kind", ["product", "cosine"])
def test_the_overlap_of_three(kind: Any) -> None:
    mergers, widths = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).double(), [2, 4, 3]
    expected = 0.0
    for one, other in ((0, 1), (0, 2), (1, 2)):
        for start, stop in ((0, 2), (2, 6), (6, 9)):
            x, y = mergers[one, start:stop], mergers[other, start:stop]
            value = (x * y).abs().mean() if kind == "product" else (x @ y).abs() / (x.norm() * y.norm())
            expected += float(value) / 3
    assert float(overlap(mergers, widths, kind)) == pytest.approx(expected, rel=1e-12)
    assert float(overlap(0 * mergers, widths, kind)) == 0.0


@pytest.mark.parametrize("basis", ["qr", "lora"])
def test_columns_are_scaled_and_nothing_else(model: LoadedModel, basis: str) -> None:
    parts, weights = adapters_on(model, 3, basis=basis, mask="upper" if basis == "qr" else "full"), [1.0, 0.8, 1.1]
    losses: list[float] = []

    def progress(done: int, total: int, loss: float) -> None:
        assert (done, total) == (len(losses) + 1, 20)
        losses.append(loss)

    how = {"steps": 20, "learning_rate": 0.1, **QUICK}
    merged = merge(parts, weights, "zip", model=model, progress=progress, **how)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert merged.header is not None
    assert merged.header.method == "zip"
    shared = basis == "qr"
    assert (merged.header.rank, merged.header.side) == ((4, "output") if shared else (12, None))
    for name, pair in merged.layers.items():
        plain = [w * dense(part, name).flatten(1) for w, part in zip(weights, parts, strict=True)]
        result = dense(merged, name).flatten(1)
        for column in range(0, result.shape[1], 7):
            span = torch.stack([each[:, column] for each in plain], dim=1)
            mergers = torch.linalg.lstsq(span, result[:, column, None]).solution
            assert float((span @ mergers - result[:, column, None]).norm()) < 1e-4 * float(result[:, column].norm())
        if shared:
            assert torch.equal(pair.B, parts[0].layers[name].B)
            assert torch.equal(pair.A, pair.A.triu())


def test_the_seed_decides(model: LoadedModel) -> None:
    parts = adapters_on(model)
    one, again, other = (merge(parts, method="zip", model=model, steps=2, seed=seed, **QUICK) for seed in (0, 0, 1))
    for name, pair in one.layers.items():
        assert torch.equal(pair.A, again.layers[name].A)
        assert not torch.equal(pair.A, other.layers[name].A)


def test_a_strong_penalty_takes_columns_apart(model: LoadedModel) -> None:
    parts = adapters_on(model, target_modules=["to_q"])
    sizes = []
    for strength in (0.0, 1000.0):
        merged = merge(
            parts, method="zip", model=model, strength=strength, steps=25, learning_rate=0.1, weight_decay=0.0, **QUICK
        )
        found = []
        for name in merged.layers:
            plain = [dense(part, name) for part in parts]
            for column in range(plain[0].shape[1]):
                span = torch.stack([each[:, column] for each in plain], dim=1)
                one, other = torch.linalg.lstsq(span, dense(merged, name)[:, column, None]).solution.flatten()
                found.append(abs(float(one * other)))
        sizes.append(sum(found) / len(found))
    assert sizes[1] < 0.2 < sizes[0]


def test_the_model_comes_back_as_it_was(model: LoadedModel) -> None:
    parts = adapters_on(model)
    attach_adapter(model.denoiser, parts[0], "theirs", weight=0.7)
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    state = torch.get_rng_state()

    def stop(done: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    try:
        merge(parts, method="zip", model=model, steps=2, **QUICK)
        with pytest.raises(KeyboardInterrupt):
            merge(parts, method="zip", model=model, steps=2, progress=stop, **QUICK)
        with pytest.raises(QrloraError, match="did not stay finite"):
            merge(parts, method="zip", model=model, steps=3, learning_rate=1e30, **QUICK)
        after = model.denoiser.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert list(model.denoiser.peft_config) == ["theirs"]
        assert model.denoiser.active_adapters() == ["theirs"]
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        remove_adapter(model.denoiser, "theirs")


def test_a_folder_and_prompts_will_do(model: LoadedModel, tiny_flux: Path) -> None:
    parts = adapters_on(model)
    nameless = [Adapter(part.layers) for part in parts]
    loaded = merge(parts, method="zip", model=model, steps=2, **QUICK)
    for where in (str(tiny_flux), tiny_flux):
        told = merge(nameless, method="zip", model=where, steps=2, prompts=" | ".join(CAPTIONS[:2]), **QUICK)
        name = next(iter(told.layers))
        assert torch.allclose(dense(told, name), dense(loaded, name), rtol=1e-3, atol=1e-4)
    listed = merge(nameless, method="zip", model=model, steps=2, prompts=list(CAPTIONS[:2]), **QUICK)
    assert torch.equal(listed.layers[name].A, told.layers[name].A)


def test_text_encoders_are_merged_by_auto(model: LoadedModel) -> None:
    parts = adapters_on(model)
    words = [with_words(seed, "text_encoder").companions for seed in range(2)]
    joint = [
        Adapter(part.layers, part.header, companions=companions) for part, companions in zip(parts, words, strict=True)
    ]
    merged = merge(joint, method="zip", model=model, steps=1, **QUICK)
    header = merged.companions["text_encoder"].header
    assert header is not None
    assert header.method == "sum"


def test_refusals(model: LoadedModel) -> None:
    parts = adapters_on(model)
    nameless = [Adapter(part.layers) for part in parts]
    for given, options, words in (
        (parts, {}, "zip learns on the base model; give it as model"),
        (parts, {"model": 3}, "model=3 is not valid"),
        (parts, {"model": model, "weights": [1.0, 0.0]}, "one weight is 0"),
        (nameless, {"model": model}, "does not say what it was trained on.*give one prompt an adapter as prompts"),
        (parts, {"model": model, "prompts": "a dog"}, "2 adapters but prompts='a dog'"),
        (parts, {"model": model, "prompts": "a dog | "}, "2 adapters but prompts="),
        (parts, {"model": model, "steps": 0}, "steps=0 is not possible"),
        (parts, {"model": model, "pictures": 0}, "pictures=0 is not possible"),
        (parts, {"model": model, "learning_rate": float("nan")}, "learning_rate=nan is not possible"),
        (parts, {"model": model, "strength": -1.0}, "strength=-1.0 is not possible"),
        (parts, {"model": model, "penalty": "sum"}, "penalty='sum' is not valid"),
    ):
        with pytest.raises(QrloraError, match=words):
            merge(given, method="zip", **options)  # type: ignore[arg-type]


def test_one_adapter_stays_what_it_is(model: LoadedModel) -> None:
    (part,) = adapters_on(model, 1)
    alone = merge([part], [0.5], "zip")
    for name in part.layers:
        assert torch.equal(alone.layers[name].A, 0.5 * part.layers[name].A)
