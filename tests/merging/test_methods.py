"""Merge methods against their equations, written out densely in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter
from qrlora.merging import merge
from tests.adapters_of_data import CONV, LINEAR, dense, made, relative

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*times as strong as"),
    pytest.mark.filterwarnings("ignore:.*was cut to rank"),
]
WEIGHTS = [0.9, 1.2]
KINDS = {
    "one basis": lambda: [made(0), made(1)],
    "input side": lambda: [made(0, side="input"), made(1, side="input", basis_seed=20)],
    "plain and basis": lambda: [made(0, header=False, side=None), made(1, basis_seed=30, rank=2)],
}
kinds = pytest.mark.parametrize("kind", KINDS)


def cut(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def trimmed(matrix: Tensor, density: float) -> Tensor:
    kept = matrix.abs().flatten().argsort(descending=True)[: int(density * matrix.numel())]
    mask = torch.zeros(matrix.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.reshape(matrix.shape), matrix, 0.0)


def voted(updates: list[Tensor], weights: list[float]) -> Tensor:
    """Entry by entry, in plain Python."""
    merged = torch.zeros_like(updates[0])
    for place in torch.cartesian_prod(*(torch.arange(size) for size in merged.shape)).tolist():
        values = [float(update[tuple(place)]) for update in updates]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
        merged[tuple(place)] = sum(agreeing) / max(1, len(agreeing))
    return merged


@kinds
@pytest.mark.parametrize("rank", [None, 1, 4])
def test_svd_is_the_best_of_its_rank(kind: str, rank: int | None) -> None:
    parts = KINDS[kind]()
    merged = merge(parts, WEIGHTS, "svd", rank=rank)
    for layer in (LINEAR, CONV):
        whole = WEIGHTS[0] * dense(parts[0], layer) + WEIGHTS[1] * dense(parts[1], layer)
        assert merged.layers[layer].rank <= (rank or 3)
        assert relative(dense(merged, layer), cut(whole, rank or 3)) < 1e-6


def test_what_is_cut_off_is_told() -> None:
    parts = [made(0), made(1, basis_seed=30)]
    whole = {layer: dense(parts[0], layer) + dense(parts[1], layer) for layer in (LINEAR, CONV)}
    lost = sum(float((value - cut(value, 2)).square().sum()) for value in whole.values())
    error = (lost / sum(float(value.square().sum()) for value in whole.values())) ** 0.5
    with pytest.warns(QrloraWarning, match=f"by svd was cut to rank 2, which leaves out {error:.2g} of its norm"):
        merge(parts, method="svd", rank=2)


@kinds
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_is_its_equations(kind: str, density: float) -> None:
    parts = KINDS[kind]()
    merged = merge(parts, WEIGHTS, "ties", density=density, rank=8)
    for layer in (LINEAR, CONV):
        expected = voted([trimmed(dense(part, layer), density) for part in parts], WEIGHTS)
        assert relative(dense(merged, layer), cut(expected, 8)) < 1e-5


def test_ties_on_coefficients_keeps_basis_and_rank() -> None:
    parts = KINDS["one basis"]()
    merged = merge(parts, WEIGHTS, "ties", density=0.5, space="coefficients")
    assert merged.header is not None
    assert (merged.header.basis, merged.header.rank, merged.header.method) == ("qr", 3, "ties")
    for layer in (LINEAR, CONV):
        assert torch.equal(merged.layers[layer].B, parts[0].layers[layer].B)
        coefficients = [part.layers[layer].A.flatten(1).double() for part in parts]
        expected = voted([trimmed(each, 0.5) for each in coefficients], WEIGHTS)
        torch.testing.assert_close(merged.layers[layer].A.flatten(1).double(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(QrloraError, match="ties on coefficients needs one basis"):
        merge(KINDS["plain and basis"](), method="ties", space="coefficients")


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), density=st.floats(0.2, 1.0))
def test_dare_keeps_entries_rescaled_or_drops_them(seed: int, density: float) -> None:
    parts = [made(0), made(1)]
    merged = merge(parts, WEIGHTS, "dare", density=density, seed=seed, space="coefficients")
    for layer in (LINEAR, CONV):
        one, two = (
            weight * part.layers[layer].A.double() / density for part, weight in zip(parts, WEIGHTS, strict=True)
        )
        found = merged.layers[layer].A.double()
        options = torch.stack([torch.zeros_like(one), one, two, one + two])
        assert float((options - found).abs().amin(dim=0).max()) < 1e-5
    again = merge(parts, WEIGHTS, "dare", density=density, seed=seed, space="coefficients")
    assert torch.equal(again.layers[LINEAR].A, merged.layers[LINEAR].A)


def test_dare_is_right_on_average_and_can_vote() -> None:
    parts = [made(0), made(1)]
    total = sum(dense(merge(parts, WEIGHTS, "dare", density=0.5, seed=seed, rank=10), LINEAR) for seed in range(400))
    plain = WEIGHTS[0] * dense(parts[0], LINEAR) + WEIGHTS[1] * dense(parts[1], LINEAR)
    assert relative(total / 400, plain) < 0.15
    voting = merge(parts, WEIGHTS, "dare", density=1.0, elect_sign=True, rank=10)
    assert relative(dense(voting, LINEAR), voted([dense(part, LINEAR) for part in parts], WEIGHTS)) < 1e-5


@kinds
def test_knots_is_its_equations(kind: str) -> None:
    parts = KINDS[kind]()
    merged = merge(parts, WEIGHTS, "knots", density=0.4, scale=0.6)
    blocks: dict[str, tuple[Tensor, list[Tensor]]] = {}
    for layer in (LINEAR, CONV):
        updates = [dense(part, layer) for part in parts]
        u, s, vh = torch.linalg.svd(torch.cat(updates, dim=1), full_matrices=False)
        kept = int((s > 1e-5).sum())
        aligned = (s[:kept, None] * vh[:kept]).split(updates[0].shape[1], dim=1)
        blocks[layer] = u[:, :kept], list(aligned)
        assert merged.layers[layer].rank == kept
    limits = []
    for index in range(2):
        entries = torch.cat([parts_of[index].flatten() for _, parts_of in blocks.values()]).abs().sort().values
        limits.append(float(entries[-int(0.4 * len(entries))]))
    for layer, (u, aligned) in blocks.items():
        # A common rotation of signs by U's columns does not change what agrees.
        trims = [
            torch.where(part.abs() >= limit * (1 - 1e-9), part, 0.0)
            for part, limit in zip(aligned, limits, strict=True)
        ]
        assert relative(dense(merged, layer), 0.6 * (u @ voted(trims, WEIGHTS))) < 1e-5


def test_knots_keeps_the_rank_of_a_shared_basis() -> None:
    merged = merge([made(0), made(1)], method="knots")
    assert {pair.rank for pair in merged.layers.values()} == {3}


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_orthogonal_leaves_the_style_nothing_the_content_reads(strength: float) -> None:
    content, style = made(0), made(1)
    merged = merge([content, style], WEIGHTS, "orthogonal", strength=strength)
    assert merged.header is not None
    assert (merged.header.method, merged.header.rank, merged.header.side) == ("orthogonal", 3, "output")
    for layer in (LINEAR, CONV):
        rows = torch.linalg.qr(dense(content, layer).T @ torch.eye(dense(content, layer).shape[0]).double())[0][:, :3]
        projector = rows @ rows.T
        cleaned = dense(style, layer) @ (torch.eye(len(projector)).double() - strength * projector)
        expected = WEIGHTS[0] * dense(content, layer) + WEIGHTS[1] * cleaned
        assert relative(dense(merged, layer), expected) < 1e-5


def test_orthogonal_of_part_of_the_energy() -> None:
    content, style = made(0), made(1)
    merged = merge([content, style], method="orthogonal", energy=0.6)
    _, s, vh = torch.linalg.svd(dense(content, LINEAR), full_matrices=False)
    shares = s.square().cumsum(0) / s.square().sum()
    rows = vh[: int((shares < 0.6).sum()) + 1]
    expected = dense(content, LINEAR) + dense(style, LINEAR) @ (torch.eye(10).double() - rows.T @ rows)
    assert relative(dense(merged, LINEAR), expected) < 1e-5


def test_refusals() -> None:
    pair = [made(0), made(1)]
    for method, options, message in [
        ("ties", {"density": 0.0}, "density=0.0 is no share"),
        ("dare", {"density": 1.5}, "density=1.5 is no share"),
        ("ties", {"space": "sparse"}, "space='sparse' is not valid"),
        ("ties", {"space": "coefficients", "rank": 3}, "rank=3 means nothing to ties on coefficients"),
        ("knots", {"density": -1.0}, "density=-1.0 is no share"),
        ("orthogonal", {"strength": 2.0}, "strength=2.0 must lie"),
        ("orthogonal", {"energy": 0.0}, "energy=0.0 is no share"),
        ("ties", {"density": "high"}, "merge method 'ties': density='high' is not valid"),
        ("svd", {"rank": True}, "rank=True is not valid"),
        ("svd", {"rang": 3}, "has no option 'rang'; its options are rank"),
    ]:
        with pytest.raises(QrloraError, match=message):
            merge(pair, method=method, **options)
    shared = [made(0, side="input"), made(1, side="input")]
    with pytest.raises(QrloraError, match="nothing of it would be left"):
        merge(shared, method="orthogonal")


def test_zero_updates_do_no_harm() -> None:
    nothing = Adapter({name: type(pair)(pair.B, 0 * pair.A) for name, pair in made(1).layers.items()}, made(1).header)
    for method in ("svd", "ties", "dare", "knots", "orthogonal"):
        with pytest.warns(QrloraWarning, match="is zero, so it adds nothing"):
            merged = merge([made(0), nothing], method=method)
        assert all(bool(torch.isfinite(pair.delta()).all()) for pair in merged.layers.values())
