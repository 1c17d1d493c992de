"""Files as the published code and its fork write them, built here from the formulas."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qrlora.adapter import attach_adapter
from qrlora.errors import QrloraError
from qrlora.formats import read_adapter, recognise, weight_source, write_adapter
from qrlora.merging import merge
from tests.published_files import FF, FLUX, OUT, RANK, SD3, SINGLE, q_and_r, qr_parts, stored, weights
from tests.real_layers import assert_same_updates, save
from tests.tiny_models import tiny_sd3


def products(parts: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
    return {layer: q.double() @ delta.double() for layer, (q, delta, _) in parts.items()}


@pytest.mark.parametrize("upper", [False, True])
def test_q_and_delta_r(tmp_path: Path, upper: bool) -> None:
    parts = qr_parts(FLUX, 1, upper=upper)
    path = save(stored(parts), tmp_path / "pytorch_lora_weights.safetensors")
    adapter = read_adapter(path)
    assert_same_updates(adapter, products(parts))
    for layer, (q, delta, _) in parts.items():
        assert torch.equal(adapter.layers[layer].B, q)  # renaming alone: bit for bit
        assert torch.equal(adapter.layers[layer].A, delta)
    header = adapter.header
    assert header is not None
    assert (header.basis, header.side, header.mask, header.rank) == ("qr", "output", "upper" if upper else "full", RANK)
    assert recognise(tmp_path).layout.name == "published"
    halved = {layer: 0.5 * product for layer, product in products(parts).items()}
    assert_same_updates(read_adapter(path, lora_alpha=RANK / 2), halved)


def test_two_of_them_merge_exactly_at_one_rank(tmp_path: Path) -> None:
    content, style = qr_parts(FLUX, 1, upper=True), qr_parts(FLUX, 2, upper=True)
    files = [save(stored(each), tmp_path / f"{n}.safetensors") for n, each in enumerate((content, style))]
    merged = merge([read_adapter(path) for path in files], [0.9, 1.0], "sum")
    one, other = products(content), products(style)
    assert_same_updates(merged, {layer: 0.9 * one[layer] + other[layer] for layer in one})
    assert {pair.rank for pair in merged.layers.values()} == {RANK}


def test_the_residual_file_is_told_from_the_adapter(tmp_path: Path) -> None:
    path = save({f"{layer}.residual.weight": w for layer, w in weights(FLUX).items()}, tmp_path / "a.safetensors")
    with pytest.raises(QrloraError, match=r"holds residuals of base weights and no adapter; give the file"):
        read_adapter(path)


def test_damage_is_told_by_the_key(tmp_path: Path) -> None:
    tensors = stored(qr_parts(FLUX, 1, upper=True))
    path = tmp_path / "a.safetensors"
    key = f"transformer.{FF}.lora.delta_r.weight"
    with pytest.raises(QrloraError, match=r"ff\.net\.0\.proj\.lora\.delta_r\.weight is missing"):
        read_adapter(save({name: tensor for name, tensor in tensors.items() if name != key}, path))
    with pytest.raises(QrloraError, match=r"ff\.net\.0\.proj\.lora\.delta_r\.weight has values that are not finite"):
        read_adapter(save({**tensors, key: tensors[key] * float("inf")}, path))
    with pytest.raises(QrloraError, match="which is not what basis qr leaves"):
        read_adapter(save({**tensors, key: tensors[key].T}, path))
    with pytest.raises(QrloraError, match="are no matrices"):
        read_adapter(save({**tensors, key: tensors[key][0]}, path))
    with pytest.raises(QrloraError, match="q without orthonormal columns"):
        read_adapter(save({**tensors, f"transformer.{FF}.lora.q.weight": torch.ones(20, RANK)}, path))


class TestTrainedTogether:
    """`lora.up` and `lora.down`: both factors trained from Q and R, and to_out.0 doubled."""

    def write(
        self, folder: Path, *layers: str, doubled: bool = True
    ) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(5)
        base = {layer: weight for layer, weight in weights(FLUX).items() if not layers or layer in layers}
        tensors: dict[str, Tensor] = {}
        updates: dict[str, Tensor] = {}
        for layer, weight in base.items():
            Q, R = q_and_r(weight)
            B = (Q + 0.1 * torch.randn(Q.shape, generator=generator)).float()
            A = (R + 0.1 * torch.randn(R.shape, generator=generator)).float()
            stem = f"{layer}.to_out.0" if doubled and "to_out.0" in layer else layer
            tensors |= {f"transformer.{stem}.lora.up.weight": B, f"transformer.{stem}.lora.down.weight": A}
            updates[layer] = B.double() @ A.double() - Q @ R
        return save(tensors, folder / "a.safetensors"), base, updates

    def test_the_bases_own_part_is_taken_off(self, tmp_path: Path) -> None:
        path, base, updates = self.write(tmp_path)
        adapter = read_adapter(path, base=base.__getitem__)
        assert {pair.rank for pair in adapter.layers.values()} == {2 * RANK}
        assert set(adapter.layers) == set(updates)
        for layer, update in updates.items():
            got = adapter.layers[layer].B.double() @ adapter.layers[layer].A.double()
            assert float((got - update).norm()) <= 1e-6 * float((got - update).norm() + 10 * update.norm())

    def test_alpha_scales_all_of_it(self, tmp_path: Path) -> None:
        path, base, updates = self.write(tmp_path)
        adapter = read_adapter(path, base=base.__getitem__, lora_alpha=2.0 * RANK)
        for layer, update in updates.items():
            got = adapter.layers[layer].B.double() @ adapter.layers[layer].A.double()
            torch.testing.assert_close(got, 2 * update, rtol=0, atol=2e-5)

    def test_without_its_base_it_is_refused_but_recognised(self, tmp_path: Path) -> None:
        path, _, _ = self.write(tmp_path)
        with pytest.raises(QrloraError, match=r"must be taken off again, so it needs its base model: give base="):
            read_adapter(path)
        found = recognise(path)
        assert found.layout.name == "published-qr"
        assert "to_out.0 is doubled" in found.evidence
        assert found.matched[f"transformer.{OUT}.to_out.0.lora.up.weight"] == OUT

    def test_another_base_is_refused(self, tmp_path: Path) -> None:
        path, base, _ = self.write(tmp_path)
        with pytest.raises(QrloraError, match=r"shape \[20, 12\], but the base model's has \[20, 13\]"):
            read_adapter(path, base={**base, FF: torch.ones(20, 13)}.__getitem__)

    def test_where_nothing_tells_it_from_an_ordinary_lora_it_must_be_said(self, tmp_path: Path) -> None:
        path, base, updates = self.write(tmp_path, SINGLE, FF)
        with pytest.raises(QrloraError, match=r"may be comfy .* or published-qr .*; say which with layout="):
            read_adapter(path)
        plain = read_adapter(path, layout="comfy").layers[FF]
        taken_off = read_adapter(path, layout="published-qr", base=base.__getitem__).layers[FF]
        Q, R = q_and_r(base[FF])
        torch.testing.assert_close(plain.delta().double() - Q @ R, updates[FF], rtol=0, atol=1e-5)
        torch.testing.assert_close(taken_off.delta().double(), updates[FF], rtol=0, atol=1e-5)

    def test_half_a_layer_or_a_layer_twice(self, tmp_path: Path) -> None:
        path, base, _ = self.write(tmp_path)
        tensors = load_file(path)
        half = {key: tensor for key, tensor in tensors.items() if key != f"transformer.{FF}.lora.up.weight"}
        with pytest.raises(QrloraError, match=r"only one of .*ff\.net\.0\.proj\.lora\.up and \.lora\.down"):
            read_adapter(save(half, path), base=base.__getitem__)
        twice = {**tensors, f"transformer.{OUT}.lora.up.weight": torch.ones(12, RANK)}
        with pytest.raises(QrloraError, match=r"to_out\.0\.up twice, once with to_out\.0 doubled"):
            read_adapter(save(twice, path), base=base.__getitem__)

    @pytest.mark.parametrize("place", ["", "transformer", "file"])
    def test_the_base_may_be_a_folder_of_diffusers(self, tmp_path: Path, place: str) -> None:
        path, base, updates = self.write(tmp_path)
        folder = tmp_path / "model" / ("" if place == "file" else place)
        folder.mkdir(parents=True)
        for number, (layer, weight) in enumerate(base.items()):
            save({f"{layer}.weight": weight}, folder / f"diffusion_pytorch_model-{number}.safetensors")
        save({f"{layer}.weight": torch.zeros(1) for layer in base}, folder / "diffusion_pytorch_model.fp16.safetensors")
        model = tmp_path / "model"
        if place == "file":
            model = save({f"{layer}.weight": weight for layer, weight in base.items()}, tmp_path / "all.safetensors")
        source = weight_source(model)
        adapter = read_adapter(path, base=source)
        torch.testing.assert_close(adapter.layers[FF].delta().double(), updates[FF], rtol=0, atol=1e-5)
        with pytest.raises(QrloraError, match="has no layer elsewhere"):
            source("elsewhere")

    def test_a_base_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(QrloraError, match=r"there is no \.safetensors in it"):
            weight_source(tmp_path)
        packed = save({"x.weight": torch.ones(2, dtype=torch.uint8)}, tmp_path / "packed.safetensors")
        with pytest.raises(QrloraError, match="is quantised"):
            weight_source(packed)("x")


class TestFork:
    """The same keys for other bases, on the attention of Stable Diffusion 3."""

    def test_the_basis_must_be_told(self, tmp_path: Path) -> None:
        path = save(stored(qr_parts(SD3, 1, upper=True)), tmp_path / "a.safetensors")
        with pytest.raises(
            QrloraError, match=r"do not say which basis .*=qr, svd, ica or moe \(qrlora export --basis\)"
        ):
            read_adapter(path)
        assert recognise(path).layout.name == "fork"
        assert recognise(path, basis="qr").layout.name == "published"
        with pytest.raises(QrloraError, match="'pca'"):
            read_adapter(path, basis="pca")

    @pytest.mark.parametrize("basis", ["qr", "svd"])
    def test_svd_and_qr(self, tmp_path: Path, basis: str) -> None:
        generator = torch.Generator().manual_seed(2)
        parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for layer, weight in weights(SD3).items():
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            base = torch.diag(S[:RANK]) @ Vh[:RANK]
            parts[layer] = (U[:, :RANK], torch.randn(base.shape, generator=generator), base)
        adapter = read_adapter(save(stored(parts), tmp_path / "a.safetensors"), basis=basis)
        assert_same_updates(adapter, products(parts))
        assert adapter.header is not None
        assert (adapter.header.basis, adapter.header.side, adapter.header.mask) == (basis, "output", "full")

    @pytest.mark.parametrize("version", [1, 2])
    def test_ica(self, tmp_path: Path, version: int) -> None:
        """dW = dS A^T with q = A `[in, r]`, or, in the second version, dW = S dA with q = S `[out, r]`."""
        generator = torch.Generator().manual_seed(3)
        parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        updates: dict[str, Tensor] = {}
        for layer, (out, inputs) in {**SD3, FF: (20, 12)}.items():
            mixing, sources = (torch.randn(size, RANK, generator=generator) for size in (inputs, out))
            if version == 1:
                delta = torch.randn(out, RANK, generator=generator)
                parts[layer] = (mixing, delta, sources)
                updates[layer] = delta.double() @ mixing.double().T
            else:
                delta = torch.randn(RANK, inputs, generator=generator)
                parts[layer] = (sources, delta, mixing.T)
                updates[layer] = sources.double() @ delta.double()
        path = save(stored(parts), tmp_path / "a.safetensors")
        adapter = read_adapter(path, basis="ica", lora_alpha=2.0 * RANK)
        assert_same_updates(adapter, {layer: 2 * update for layer, update in updates.items()})
        assert adapter.header is not None
        assert (adapter.header.basis, adapter.header.side) == ("ica", "input" if version == 1 else "output")
        for layer, (q, _, _) in parts.items():
            pair = adapter.layers[layer]
            assert torch.equal(pair.A if version == 1 else pair.B, q.T if version == 1 else q)
        with pytest.raises(QrloraError, match=r"was it trained with another one"):
            read_adapter(path, basis="svd")
        back = read_adapter(write_adapter(adapter, tmp_path / "b.safetensors", "kohya", family="sd3"))
        assert_same_updates(back, adapter.layers)

    def test_a_square_delta_cannot_be_told(self, tmp_path: Path) -> None:
        parts = {"transformer_blocks.0.attn.to_q": (torch.ones(3, 3), torch.ones(3, 3), torch.ones(3, 3))}
        with pytest.raises(QrloraError, match="the side of q cannot be told"):
            read_adapter(save(stored(parts), tmp_path / "a.safetensors"), basis="ica")

    def gated(self, folder: Path, **change: Tensor) -> tuple[Path, dict[str, Tensor]]:
        """Four experts of rank 1, each with a Q of its own band, and a gate without zeros."""
        generator = torch.Generator().manual_seed(4)
        tensors: dict[str, Tensor] = {}
        for layer, weight in weights(dict.fromkeys(SD3, (32, 32))).items():
            U, _, Vh = torch.linalg.svd(weight)
            delta = torch.randn(4, 32, generator=generator)
            tensors |= stored({layer: (U[:, :4], delta, Vh[:4])})
            gate = torch.randn(4, 32, generator=generator), torch.randn(4, generator=generator)
            tensors |= {
                f"transformer.{layer}.gate.{name}": part for name, part in zip(("weight", "bias"), gate, strict=True)
            }
        tensors = {key: part for key, part in (tensors | change).items() if part.numel()}
        return save(tensors, folder / "a.safetensors"), tensors

    @pytest.mark.parametrize("top_k", [None, 2])
    def test_gated_files_are_gated_adapters(self, tmp_path: Path, top_k: int | None) -> None:
        """y = W x + s Q (expand(g(x)) * dR x), on the layer that peft puts in its place."""
        path, tensors = self.gated(tmp_path)
        adapter = read_adapter(path, basis="moe", top_k=top_k, lora_alpha=8.0)
        assert recognise(path).needs is None  # the gates tell
        copy = read_adapter(write_adapter(adapter, tmp_path / "b.safetensors", "own"))
        model = tiny_sd3()
        attach_adapter(model, copy, "content")
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(6))
        for layer in SD3:
            stem = f"transformer.{layer}"
            scores = (x @ tensors[f"{stem}.gate.weight"].T + tensors[f"{stem}.gate.bias"]).softmax(-1)
            if top_k is not None:
                scores = scores * (scores >= scores.sort(dim=-1).values[..., -top_k, None])
                scores = scores / scores.sum(-1, keepdim=True)
            coefficients = scores * (x @ tensors[f"{stem}.lora.delta_r.weight"].T)
            expected = 2 * coefficients @ tensors[f"{stem}.lora.q.weight"].T
            with torch.no_grad():
                update = model.get_submodule(layer)(x) - tiny_sd3().get_submodule(layer)(x)
            torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)

    def test_gated_files_are_no_loras(self, tmp_path: Path) -> None:
        path, _ = self.gated(tmp_path)
        adapter = read_adapter(path)
        for format, suffix in (("diffusers", ".safetensors"), ("peft", ""), ("kohya", ".safetensors")):
            with pytest.raises(QrloraError, match=r"gated adapter and cannot be .* differs from token to token"):
                write_adapter(adapter, tmp_path / f"out{suffix}", format, family="sd3")
        with pytest.raises(QrloraError, match=r"has gates .* so it is a Freq-MoE adapter; its basis is moe"):
            read_adapter(path, basis="svd")
        plain = save(stored(qr_parts(SD3, 1, upper=True)), tmp_path / "c.safetensors")
        with pytest.raises(QrloraError, match="has no gates, so it is no Freq-MoE adapter"):
            read_adapter(plain, basis="moe")

    def test_gates_that_do_not_fit(self, tmp_path: Path) -> None:
        stem = f"transformer.{OUT}"
        for key, value, message in (
            ("gate.weight", torch.ones(3, 32), r"gate \[3, 32\] and bias \[4\], which do not fit"),
            ("gate.weight", torch.ones(4, 31), "which do not fit rank 4 on 32 inputs"),
            ("gate.bias", torch.ones(5), r"bias \[5\], which do not fit"),
            ("gate.weight", torch.ones(0), r"gate\.weight is missing"),
            ("lora.q.weight", torch.ones(0), r"lora\.q\.weight is missing"),
        ):
            path, _ = self.gated(tmp_path, **{f"{stem}.{key}": value})
            with pytest.raises(QrloraError, match=message):
                read_adapter(path)
        path, _ = self.gated(tmp_path, **{f"{stem}.gate.bias": torch.ones(0)})
        assert not read_adapter(path).own[OUT]["gate_bias"].any()
        with pytest.raises(QrloraError, match="with top_k 5"):
            read_adapter(path, top_k=5)
