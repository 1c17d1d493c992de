"""The native file: a vanilla LoRA, read back exactly, and refused by the key where it is damaged."""

import json
import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank, read_adapter, write_native
from tests.adapters_of_data import CONV, LINEAR, dense, made, relative


def assert_equal(one: Adapter, other: Adapter) -> None:
    assert list(one.layers) == list(other.layers)
    for layer, pair in one.layers.items():
        assert torch.equal(pair.A, other.layers[layer].A)
        assert torch.equal(pair.B, other.layers[layer].B)
    assert one.header == other.header
    assert one.component == other.component


@pytest.mark.parametrize("side", ["output", "input", None])
def test_what_is_written_is_read_back(tmp_path: Path, side: str | None) -> None:
    fields = {"base_model": "base", "training": {"steps": 3}, "weight_hashes": {LINEAR: "float32:ab"}}
    adapter = made(side=side, trigger_words=["<c>"], **fields)
    assert_equal(read_adapter(adapter.save(tmp_path / "new" / "a.safetensors")), adapter)


def test_the_file_is_a_vanilla_diffusers_lora_with_one_more_header_key(tmp_path: Path) -> None:
    path = made().save(tmp_path / "a.safetensors")
    tensors = load_file(path)
    assert set(tensors) == {f"transformer.{layer}.lora_{f}.weight" for layer in (LINEAR, CONV) for f in "AB"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"format", "lora_adapter_metadata", "qrlora"}
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 3
    assert config["transformer.init_lora_weights"] is True
    assert config["transformer.target_modules"] == [LINEAR, CONV]


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    contents = {made(base_model="base").save(tmp_path / f"{n}.safetensors").read_bytes() for n in range(4)}
    assert len(contents) == 1


def test_bf16_halves_the_file_and_rounds(tmp_path: Path) -> None:
    adapter = made()
    path = adapter.save(tmp_path / "a.safetensors", save_dtype="bf16")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    back = read_adapter(path).layers[LINEAR]
    assert torch.equal(back.A, adapter.layers[LINEAR].A.bfloat16().float())


def test_layers_of_different_rank_keep_a_scale_of_one(tmp_path: Path) -> None:
    adapter = made(header=False)
    wide = LowRank(torch.randn(12, 5), torch.randn(5, 10))
    mixed = Adapter({**adapter.layers, LINEAR: wide, "blocks.1.attn.to_q": adapter.layers[LINEAR]}, None)
    back = read_adapter(write_native(mixed, tmp_path / "a.safetensors"))
    for layer in mixed.layers:
        assert torch.equal(back.layers[layer].delta(), mixed.layers[layer].delta())


@settings(max_examples=15, deadline=None)
@given(weight=st.floats(-3, 3), side=st.sampled_from(["output", "input", None]))
def test_scaled_is_the_scaled_delta_on_an_untouched_basis(weight: float, side: str | None) -> None:
    weight = weight if abs(weight) > 1e-9 else 0.0
    adapter = made(side=side)
    scaled = adapter.scaled(weight)
    for layer, pair in adapter.layers.items():
        error = (dense(scaled, layer) - weight * dense(adapter, layer)).norm()
        assert error <= 1e-6 * abs(weight) * dense(adapter, layer).norm()
        assert side != "output" or scaled.layers[layer].B is pair.B
        assert side != "input" or scaled.layers[layer].A is pair.A


def test_scaled_refuses_what_is_not_a_number() -> None:
    with pytest.raises(QrloraError, match="not a finite number"):
        made().scaled(float("nan"))


class TestOtherTools:
    """Plain LoRA files: every way to say alpha ends in the factors."""

    def write(self, path: Path, config: dict[str, object] | None = None, **extra: torch.Tensor) -> Path:
        pair = made().layers[LINEAR]
        tensors = {"transformer.to_q.lora_A.weight": pair.A, "transformer.to_q.lora_B.weight": pair.B} | extra
        metadata = None
        if config is not None:
            metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        return path

    @pytest.mark.parametrize(
        ("config", "extra", "scale"),
        [
            (None, {}, 1.0),
            ({"r": 3, "lora_alpha": 6}, {}, 2.0),
            ({"r": 3, "lora_alpha": 6, "use_rslora": True}, {}, 6 / 3**0.5),
            ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"to_q": 9}}, {}, 3.0),
            ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"^elsewhere": 9}}, {}, 2.0),
            (None, {"transformer.to_q.alpha": torch.tensor(1.5)}, 0.5),
        ],
    )
    def test_alpha(
        self, tmp_path: Path, config: dict[str, object] | None, extra: dict[str, torch.Tensor], scale: float
    ) -> None:
        adapter = read_adapter(self.write(tmp_path / "a.safetensors", config, **extra))
        assert adapter.header is None
        assert relative(adapter.layers["to_q"].delta(), scale * dense(made(), LINEAR)) < 1e-6

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"use_dora": True}, "lora_magnitude_vector is missing"),
            ({"init_lora_weights": "pissa"}, "pissa"),
            ({"bias": "all"}, "bias"),
        ],
    )
    def test_more_than_a_lora_is_refused(self, tmp_path: Path, config: dict[str, object], message: str) -> None:
        with pytest.raises(QrloraError, match=message):
            read_adapter(self.write(tmp_path / "a.safetensors", config))

    @pytest.mark.parametrize(
        "key",
        [
            "text_encoder.q.lora_A.weight",
            "transformer.to_q.lora.down.weight",
            "lora_unet_to_q.lora_down.weight",
            "transformer.to_q.lora_B.bias",
            "transformer.to_k.lora_A.weight",
            "unet.to_k.lora_A.weight",
        ],
    )
    def test_other_keys_are_refused_by_name(self, tmp_path: Path, key: str) -> None:
        with pytest.raises(QrloraError, match=key.removeprefix("transformer.").removesuffix(".lora_A.weight")):
            read_adapter(self.write(tmp_path / "a.safetensors", None, **{key: torch.ones(3, 2)}))

    def test_a_folder_that_diffusers_saved_to(self, tmp_path: Path) -> None:
        self.write(tmp_path / "pytorch_lora_weights.safetensors")
        assert list(read_adapter(tmp_path).layers) == ["to_q"]
        with pytest.raises(QrloraError, match="neither"):
            read_adapter(tmp_path.parent)


class TestDamage:
    def test_truncated_names_the_first_key_that_is_cut(self, tmp_path: Path) -> None:
        path = made().save(tmp_path / "a.safetensors")
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(QrloraError, match=rf"truncated: transformer\.{CONV}\.lora_B\.weight ends 10 bytes past"):
            read_adapter(path)

    @pytest.mark.parametrize("length", [0, 5, 8, 40])
    def test_cut_within_the_header(self, tmp_path: Path, length: int) -> None:
        path = made().save(tmp_path / "a.safetensors")
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(QrloraError, match="truncated within its header"):
            read_adapter(path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite_names_the_key(self, tmp_path: Path, value: float) -> None:
        path = made().save(tmp_path / "a.safetensors")
        tensors = load_file(path)
        tensors[f"transformer.{CONV}.lora_A.weight"][0, 0, 0, 0] = value
        save_file(tensors, path)
        with pytest.raises(QrloraError, match=rf"{CONV}\.lora_A\.weight has values that are not finite"):
            read_adapter(path)

    def test_absurd_shapes_are_refused_before_anything_is_allocated(self, tmp_path: Path) -> None:
        header = json.dumps(
            {"transformer.x.lora_A.weight": {"dtype": "F32", "shape": [2**40] * 2, "data_offsets": [0, 8]}}
        )
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
        with pytest.raises(QrloraError, match=r"transformer\.x\.lora_A\.weight claims the absurd shape"):
            read_adapter(path)

    def test_headers_beyond_what_python_counts(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        for header in (
            '{"x": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}',
            '{"x":' * 200_000 + "0" + "}" * 200_000,
        ):
            path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
            with pytest.raises(QrloraError, match=r"malformed|not JSON"):
                read_adapter(path)

    @pytest.mark.parametrize("entry", [{"dtype": "F32"}, 3, {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}])
    def test_malformed_entries(self, tmp_path: Path, entry: object) -> None:
        header = json.dumps({"transformer.x": entry})
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
        with pytest.raises(QrloraError, match=r"entry for transformer\.x is malformed"):
            read_adapter(path)

    def test_any_flipped_byte_is_refused_or_harmless(self, tmp_path: Path) -> None:
        path = made(trigger_words=["<c>"], weight_hashes={LINEAR: "float32:a"}).save(tmp_path / "a.safetensors")
        content, draw = path.read_bytes(), random.Random(0)
        length = struct.unpack("<Q", content[:8])[0]
        for _ in range(300):
            damaged = bytearray(content)
            damaged[draw.randrange(length + 8)] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with suppress(QrloraError):
                read_adapter(path)

    @pytest.mark.parametrize(
        "pattern", [{"(": 3}, {"(a+)+b": 3}, {"to_q": "x"}, {"to_q": None}, ["to_q"], {"to_q": float("inf")}]
    )
    def test_alpha_patterns_that_make_no_sense(self, tmp_path: Path, pattern: object) -> None:
        path = TestOtherTools().write(tmp_path / "a.safetensors", {"lora_alpha": 3, "alpha_pattern": pattern})
        with pytest.raises(QrloraError, match="to_q has"):
            read_adapter(path)

    def test_garbage_and_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", 12) + b"not json at all, but long enough")
        with pytest.raises(QrloraError, match="not JSON"):
            read_adapter(path)
        with pytest.raises(QrloraError, match="does not exist"):
            read_adapter(tmp_path / "none.safetensors")

    def test_factors_that_do_not_pair(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        save_file({"unet.q.lora_A.weight": torch.ones(3, 4), "unet.q.lora_B.weight": torch.ones(4, 2)}, path)
        with pytest.raises(QrloraError, match=r"q: lora_B .* are no low-rank pair"):
            read_adapter(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format_version": 99}, "update qrlora"),
            ({"rnak": 3}, "rnak"),
            ({"side": "left"}, "side"),
        ],
    )
    def test_header(self, tmp_path: Path, change: dict[str, object], message: str) -> None:
        path = made().save(tmp_path / "a.safetensors")
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        metadata["qrlora"] = json.dumps(json.loads(metadata["qrlora"]) | change)
        save_file(load_file(path), path, metadata)
        with pytest.raises(QrloraError, match=message):
            read_adapter(path)


class TestRefusedSaves:
    def test_nothing_is_written_over(self, tmp_path: Path) -> None:
        path = made().save(tmp_path / "a.safetensors")
        before = path.read_bytes()
        bad = made()
        bad.layers[CONV].A[0] = float("nan")
        for coefficients_only in (False, True):
            with pytest.raises(QrloraError, match=CONV):
                bad.save(path, coefficients_only=coefficients_only)
        assert path.read_bytes() == before
        assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]

    def test_overflow_in_bf16_is_seen(self, tmp_path: Path) -> None:
        big = made()
        big.layers[LINEAR].A[0, 0] = 3.4028e38
        with pytest.raises(QrloraError, match="not finite"):
            big.save(tmp_path / "a.safetensors", save_dtype="bf16")
        big.save(tmp_path / "a.safetensors")

    def test_names_and_dtypes(self, tmp_path: Path) -> None:
        with pytest.raises(QrloraError, match=r"ends in \.safetensors"):
            made().save(tmp_path / "a.bin")
        with pytest.raises(QrloraError, match="save_dtype"):
            made().save(tmp_path / "a.safetensors", save_dtype="fp8")  # pyright: ignore[reportArgumentType]
        with pytest.raises(QrloraError, match="no layers"):
            Adapter({}, None)
