"""LoRA-LEGO and DO-Merging against their equations, written out densely in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, LowRank
from qrlora.merging import merge
from tests.adapters_of_data import CONV, LINEAR, dense, made, relative

pytestmark = pytest.mark.filterwarnings("ignore:.*times as strong as")
LAYERS = (LINEAR, CONV)
WEIGHTS = [0.9, -1.2]
KINDS = {
    "one basis": lambda: [made(0), made(1)],
    "input side": lambda: [made(0, side="input"), made(1, side="input")],
    "plain and basis": lambda: [made(0, header=False, side=None), made(1, basis_seed=30, rank=2)],
}
kinds = pytest.mark.parametrize("kind", KINDS)


def units(update: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Balanced: both halves of norm sqrt(S_k)."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    return [(s[k].sqrt() * vh[k], s[k].sqrt() * u[:, k]) for k in range(rank)]


@kinds
def test_lego_with_a_group_for_each_unit_is_the_sum_scaled(kind: str) -> None:
    parts = KINDS[kind]()
    merged = merge(parts, WEIGHTS, "lego", clusters=50)
    for layer in LAYERS:
        expected = WEIGHTS[0] * dense(parts[0], layer) + WEIGHTS[1] * dense(parts[1], layer)
        rank = max(part.layers[layer].rank for part in parts)
        assert relative(dense(merged, layer), (rank / 50) ** 0.5 * expected) < 1e-5
        assert merged.layers[layer].rank == sum(part.layers[layer].rank for part in parts)


@kinds
def test_lego_of_one_group_is_the_mean_unit(kind: str) -> None:
    """Signs as Lloyd's iteration leaves them: those with which the mean agrees."""
    parts = KINDS[kind]()
    merged = merge(parts, WEIGHTS, "lego", clusters=1, steps=50)
    for layer in LAYERS:
        given = [part.layers[layer].rank for part in parts]
        found: list[tuple[Tensor, Tensor]] = []
        for part, weight, rank in zip(parts, WEIGHTS, given, strict=True):
            found += units(weight * dense(part, layer), rank)
        a, b = (torch.stack(half) for half in zip(*found, strict=True))
        features = torch.cat([a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)], dim=1)
        candidates = torch.cartesian_prod(*[torch.tensor([1.0, -1.0]).double()] * len(found))
        settled = [signs for signs in candidates if bool(((features @ (signs @ features)) * signs > 0).all())]
        peaks = torch.cat([a, b], dim=1).abs().amax(dim=1).mean()
        options = []
        for signs in settled:
            mean_a, mean_b = signs @ a / len(found), signs @ b / len(found)
            scale = peaks / torch.cat([mean_a, mean_b]).abs().max()
            options.append(max(given) ** 0.5 * scale**2 * torch.outer(mean_b, mean_a))
        assert min(relative(dense(merged, layer), option) for option in options) < 1e-5


def test_lego_groups_units_that_are_alike() -> None:
    """Two adapters of the same three units, one turned round and stronger: three groups of two."""
    base = made(0)
    other = made(0).scaled(-4.0)
    merged = merge([base, other], [1.0, -1.0], "lego")
    for layer in LAYERS:
        # A unit and one twice as long in both halves: their mean is as long as the mean of both.
        assert relative(dense(merged, layer), 1.5**2 * dense(base, layer)) < 1e-5
        assert merged.layers[layer].rank == 3


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 100), clusters=st.integers(1, 7), turn=st.integers(0, 100))
def test_lego_does_not_depend_on_how_factors_are_written(seed: int, clusters: int, turn: int) -> None:
    parts = [made(0), made(1, basis_seed=30)]
    generator = torch.Generator().manual_seed(turn)
    written: list[Adapter] = []
    for part in parts:
        mix = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0] * 3
        layers = {}
        for name, pair in part.layers.items():
            B = (pair.B.flatten(1).double() @ mix).float().reshape(pair.B.shape)
            A = (torch.linalg.inv(mix) @ pair.A.flatten(1).double()).float().reshape(pair.A.shape)
            layers[name] = LowRank(B, A)
        written.append(Adapter(layers))
    one, other = (merge(each, WEIGHTS, "lego", clusters=clusters, seed=seed) for each in (parts, written))
    again = merge(parts, WEIGHTS, "lego", clusters=clusters, seed=seed)
    for layer in LAYERS:
        assert relative(dense(one, layer), dense(other, layer)) < 1e-3
        assert torch.equal(one.layers[layer].B, again.layers[layer].B)
        assert one.layers[layer].rank <= min(clusters, 6)


def moved(factors: list[Tensor], strength: float, steps: int, rate: float) -> list[Tensor]:
    """Gradient descent by autograd, each factor of spectral norm 1 meanwhile."""
    sizes = [torch.linalg.svdvals(factor)[0] for factor in factors]
    starts = [factor / size for factor, size in zip(factors, sizes, strict=True)]
    now = [start.clone().requires_grad_() for start in starts]
    step = rate / (4 * (len(factors) - 1) + 2 * strength)
    for _ in range(steps):
        crossed = [(x @ y.T).square().sum() for i, x in enumerate(now) for j, y in enumerate(now) if i != j]
        held = [(x - start).square().sum() for x, start in zip(now, starts, strict=True)]
        slopes = torch.autograd.grad(sum(crossed) + strength * sum(held), now)
        now = [(x - step * slope).detach().requires_grad_() for x, slope in zip(now, slopes, strict=True)]
    return [size * x.detach() for size, x in zip(sizes, now, strict=True)]


def averaged(updates: list[Tensor], directions: list[Tensor], weights: list[float], renormalise: bool) -> Tensor:
    magnitude = sum(abs(w) * each.norm(dim=0) for w, each in zip(weights, updates, strict=True)) / len(updates)
    units = [(1 if w > 0 else -1) * each / each.norm(dim=0) for w, each in zip(weights, directions, strict=True)]
    mean = sum(units) / len(updates)
    return (mean / mean.norm(dim=0) if renormalise else mean) * magnitude


@kinds
@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_do_is_its_equations(kind: str, axis: str, renormalise: bool) -> None:
    parts = KINDS[kind]()
    how = {"strength": 0.3, "steps": 7, "learning_rate": 0.5}
    merged = merge(parts, WEIGHTS, "do", axis=axis, renormalise=renormalise, **how)
    kept = (kind, axis) in (("one basis", "input"), ("input side", "output"))
    assert merged.header is not None
    assert (merged.header.side is not None) == kept
    for layer in LAYERS:
        updates = [dense(part, layer) for part in parts]
        if axis == "output":
            updates = [update.T for update in updates]
        if kept:
            pairs = [part.layers[layer] for part in parts]
            trained = [
                pair.A.flatten(1).double() if axis == "input" else pair.B.flatten(1).double().T for pair in pairs
            ]
            basis = pairs[0].B.flatten(1).double() if axis == "input" else pairs[0].A.flatten(1).double().T
            directions = [basis @ each for each in moved(trained, 0.3, 7, 0.5)]
            assert merged.layers[layer].rank == 3
            factor = "B" if axis == "input" else "A"
            assert torch.equal(getattr(merged.layers[layer], factor), getattr(pairs[0], factor))
        else:
            halves = [units(update, part.layers[layer].rank) for update, part in zip(updates, parts, strict=True)]
            A = moved([torch.stack([a for a, _ in each]) for each in halves], 0.3, 7, 0.5)
            B = moved([torch.stack([b for _, b in each]) for each in halves], 0.3, 7, 0.5)
            directions = [b.T @ a for b, a in zip(B, A, strict=True)]
            assert merged.layers[layer].rank == sum(part.layers[layer].rank for part in parts)
        expected = averaged(updates, directions, WEIGHTS, renormalise)
        assert relative(dense(merged, layer), expected if axis == "input" else expected.T) < 1e-5


def test_do_leaves_a_lone_adapter_and_averages_equal_ones() -> None:
    parts = [made(0), made(1)]
    alone = merge([made(0), made(1)], [2.0, 0.0], "do", steps=50)
    for layer in LAYERS:
        assert relative(dense(alone, layer), 2 * dense(parts[0], layer)) < 1e-5
    # Means: as strong as each, not twice as strong.
    same = merge([made(0), made(0)], method="do", steps=0)
    assert relative(dense(same, LINEAR), dense(parts[0], LINEAR)) < 1e-5


def test_zero_updates_and_columns_do_no_harm() -> None:
    nothing = Adapter({name: LowRank(pair.B, 0 * pair.A) for name, pair in made(1).layers.items()}, made(1).header)
    holed = Adapter({name: LowRank(pair.B, pair.A.clone()) for name, pair in made(1).layers.items()}, made(1).header)
    for pair in holed.layers.values():
        pair.A[:, 0] = 0
    for method in ("lego", "do"):
        for parts in ([made(0), nothing], [nothing, nothing]):
            with pytest.warns(QrloraWarning, match="is zero, so it adds nothing"):
                merged = merge(parts, method=method)
            assert all(bool(torch.isfinite(pair.delta()).all()) for pair in merged.layers.values())
        merged = merge([holed, holed], method=method)
        assert float(dense(merged, LINEAR)[:, 0].norm()) < 1e-6


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("lego", {"clusters": 0}, "clusters=0 is no number of clusters"),
        ("lego", {"steps": -1}, "steps=-1 is no number of steps"),
        ("do", {"strength": -1.0}, "must not be below 0"),
        ("do", {"learning_rate": 2.0}, "learning_rate=2.0 must lie between 0 and 2"),
        ("do", {"axis": "both"}, "axis='both' is not valid"),
        ("do", {"weights": [0.0, 0.0]}, "every weight is 0"),
    ],
)
def test_refusals(method: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(QrloraError, match=words):
        merge([made(0), made(1)], method=method, **options)  # type: ignore[arg-type]
