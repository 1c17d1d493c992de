"""A stranger's file: whatever is wrong with it, one sentence, before anything that it claims is allocated."""

import json
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from qrlora.errors import QrloraError
from qrlora.formats import import_adapter, recognise, write_adapter
from qrlora.formats._safetensors import shown
from tests.published_files import FLUX, SD3, qr_parts, stored
from tests.real_layers import real_adapter, save

Header = dict[str, Any]


def written(layout: str, folder: Path) -> Path:
    """A good small file of each layout; `base` and `basis` that it needs are in `OPTIONS`."""
    path = folder / "a.safetensors"
    if layout in ("published", "fork"):
        parts = qr_parts(FLUX if layout == "published" else SD3, 1, upper=True)
        return save(stored(parts), path)
    if layout == "published-qr":
        stem = "transformer.transformer_blocks.0.attn.to_out.0.to_out.0.lora"
        return save({f"{stem}.up.weight": torch.ones(4, 2), f"{stem}.down.weight": torch.ones(2, 4)}, path)
    adapter = real_adapter("flux", "attn.to_q", "ff.net.2")
    if layout == "peft":
        write_adapter(adapter, folder / "peft", "peft")
        return folder / "peft" / "adapter_model.safetensors"
    return write_adapter(adapter, path, layout)


LAYOUTS = ("diffusers", "peft", "kohya", "comfy", "published", "published-qr", "fork")
OPTIONS: dict[str, dict[str, Any]] = {
    "fork": {"basis": "svd"},
    "published-qr": {"base": lambda layer: torch.eye(4)},
}


def opened(layout: str, file: Path) -> Any:
    return import_adapter(file.parent if layout == "peft" else file, **OPTIONS.get(layout, {}))


def change_header(path: Path, change: Callable[[Header], object], body: bytes | None = None) -> None:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    write_raw(path, json.dumps(header).encode(), content[8 + length :] if body is None else body)


def write_raw(path: Path, header: bytes, body: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def first_key(header: Header) -> str:
    return sorted(key for key in header if key != "__metadata__")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
class TestEveryLayout:
    def test_the_good_file_is_read(self, tmp_path: Path, layout: str) -> None:
        assert opened(layout, written(layout, tmp_path)).recognised.layout.name == layout

    def test_truncated(self, tmp_path: Path, layout: str) -> None:
        path = written(layout, tmp_path)
        content = path.read_bytes()
        for length in (0, 7, 30, len(content) - 1):
            path.write_bytes(content[:length])
            with pytest.raises(QrloraError, match="truncated"):
                opened(layout, path)

    def test_tensors_that_share_bytes(self, tmp_path: Path, layout: str) -> None:
        path = written(layout, tmp_path)

        def overlap(header: Header) -> None:
            keys = sorted((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
            begin, end = header[keys[1]]["data_offsets"]
            header[keys[1]]["data_offsets"] = [begin - 4, end - 4]

        change_header(path, overlap)
        with pytest.raises(QrloraError, match="share bytes"):
            opened(layout, path)

    def test_a_key_twice(self, tmp_path: Path, layout: str) -> None:
        path = written(layout, tmp_path)
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        key = first_key(header)
        again = f',"{key}":{json.dumps(header[key])}}}'.encode()
        write_raw(path, json.dumps(header).encode()[:-1] + again, content[8 + length :])
        with pytest.raises(QrloraError, match=r"has .+ twice"):
            opened(layout, path)

    def test_absurd_ranks(self, tmp_path: Path, layout: str) -> None:
        path = written(layout, tmp_path)

        def grow(header: Header) -> None:
            # As large as the sparse file below is, so that only the rank is absurd.
            header[first_key(header)] |= {"dtype": "F32", "shape": [2**15, 2**15], "data_offsets": [0, 2**32]}
            for key in [key for key in header if key not in ("__metadata__", first_key(header))]:
                header[key] |= {"shape": [0], "data_offsets": [2**32, 2**32]}

        change_header(path, grow)
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size + 2**32)
        tracemalloc.start()
        with pytest.raises(QrloraError, match="a rank above 8192; this is no LoRA"):
            opened(layout, path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()

    def test_values_that_are_not_finite(self, tmp_path: Path, layout: str) -> None:
        path = written(layout, tmp_path)
        content = path.read_bytes()
        nan = struct.pack("<f", float("nan"))
        length = struct.unpack("<Q", content[:8])[0]
        path.write_bytes(content[: 8 + length] + nan * ((len(content) - 8 - length) // 4))
        with pytest.raises(QrloraError, match="not finite"):
            opened(layout, path)

    def test_any_flipped_byte_is_refused_or_harmless(self, tmp_path: Path, layout: str) -> None:
        path = written(layout, tmp_path)
        content, draw = path.read_bytes(), random.Random(0)
        length = struct.unpack("<Q", content[:8])[0]
        for _ in range(60):
            damaged = bytearray(content)
            damaged[draw.randrange(length + 8)] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with suppress(QrloraError):
                opened(layout, path)

    def test_renamed_keys_are_told_by_name(self, tmp_path: Path, layout: str) -> None:
        path = written(layout, tmp_path)

        def rename(header: Header) -> None:
            header["somewhere.else.weight"] = header.pop(first_key(header))

        change_header(path, rename)
        with pytest.raises(QrloraError, match=r"somewhere\.else\.weight"):
            opened(layout, path)


class TestHeaders:
    @pytest.mark.parametrize(
        ("length", "message"),
        [
            (10 * 2**30, "truncated within its header"),
            (2**63, "truncated within its header"),
            (2**64 - 1, "truncated within its header"),
        ],
    )
    def test_a_header_longer_than_the_file(self, tmp_path: Path, length: int, message: str) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", length) + b"{}" * 40)
        with pytest.raises(QrloraError, match=message):
            recognise(path)

    def test_a_header_of_ten_gigabytes_that_is_there(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", 10 * 2**30))
        with path.open("r+b") as stream:
            stream.truncate(11 * 2**30)  # sparse: it takes no room
        tracemalloc.start()
        with pytest.raises(QrloraError, match="claims a header of 10737418240 bytes, more than any adapter has"):
            recognise(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (b'{"a\xff": 1}', "not UTF-8"),
            ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
            (b"[1, 2]", "not a JSON object"),
            (b'{"__metadata__": [1]}', "metadata is not a JSON object"),
            (b"{}", "holds no tensors"),
            (b'{"__metadata__": {"format": "pt"}}', "holds no tensors"),
            (b'{"a\\u001b[2J": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', r"a\\x1b\[2J is not the name"),
            (b'{"%s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}' % (b"a" * 9999), r"\.\.\. \(9999 char"),
            (b'{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}', "malformed"),
            (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "malformed"),
            (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', "malformed"),
            (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "from -4 on"),
            (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "absurd shape"),
            (b'{"a": {"dtype": "F32", "shape": [%s1], "data_offsets": [0, 4]}}' % (b"1," * 5000), "absurd shape"),
            (b'{"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}', "has dtype F8_E4M3"),
            (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "not a readable safetensors file"),
        ],
    )
    def test_headers_that_make_no_sense(self, tmp_path: Path, header: bytes, message: str) -> None:
        path = tmp_path / "a.safetensors"
        write_raw(path, header, bytes(8))
        with pytest.raises(QrloraError, match=message) as caught:
            import_adapter(path, layout="diffusers") if b"[4, 8]" not in header else _read_all(path)
        assert len(str(caught.value)) < 600

    def test_too_many_tensors(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        write_raw(path, json.dumps({f"{number}": entry for number in range(50_001)}).encode())
        with pytest.raises(QrloraError, match="claims 50001 tensors"):
            recognise(path)

    def test_texts_are_shown_in_bounds(self) -> None:
        assert shown("lora_unet_häuser.weight") == "lora_unet_häuser.weight"
        assert shown("a\x1b\nb") == r"a\x1b\nb"
        assert len(shown("a" * 100_000)) < 160


def _read_all(path: Path) -> None:
    from qrlora.formats import read_safetensors

    read_safetensors(path)


class TestOtherFiles:
    @pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".PT"])
    def test_pickles_are_refused_by_their_name(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"a{suffix}"
        torch.save({"a": torch.ones(2)}, path)
        with pytest.raises(QrloraError, match=r"is a pickle, .*; convert it to \.safetensors with the tool"):
            recognise(path)

    @pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
    def test_renamed_pickles_by_their_content(self, tmp_path: Path, protocol: int | None) -> None:
        path = tmp_path / "a.safetensors"
        if protocol is None:
            torch.save({"a": torch.ones(2)}, path)
        else:
            path.write_bytes(pickle.dumps({"a": list(range(100))}, protocol))
        with pytest.raises(QrloraError, match="is a pickle"):
            recognise(path)

    def test_folders_of_pickles(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"PK\x03\x04")
        with pytest.raises(QrloraError, match=r"pytorch_lora_weights\.bin is a pickle"):
            recognise(tmp_path)
        (tmp_path / "adapter_config.json").write_text("{}")
        (tmp_path / "adapter_model.bin").write_bytes(b"PK\x03\x04")
        with pytest.raises(QrloraError, match=r"adapter_model\.bin is a pickle"):
            recognise(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"<!DOCTYPE html><html>sign in</html>", "a web page"),
            (b"<html><body>404</body></html>", "a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
            (b"GGUF\x03\x00\x00\x00" + bytes(60), "a GGUF file"),
            (b"\x89PNG\r\n\x1a\n" + bytes(60), "not a safetensors file"),
        ],
    )
    def test_what_people_download_instead(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(content)
        with pytest.raises(QrloraError, match=message):
            recognise(path)

    def test_a_base_model_is_no_adapter(self, tmp_path: Path) -> None:
        tensors = {"double_blocks.0.img_attn.qkv.weight": torch.ones(6, 2), "img_in.bias": torch.ones(2)}
        with pytest.raises(QrloraError, match=r"is of no layout known here .*; its first key is double_blocks"):
            recognise(save(tensors, tmp_path / "a.safetensors"))

    def test_unknown_layouts(self, tmp_path: Path) -> None:
        path = written("kohya", tmp_path)
        with pytest.raises(
            QrloraError, match="'a1111' is not known; the known ones are coefficients, comfy, diffusers"
        ):
            recognise(path, layout="a1111")
        with pytest.raises(QrloraError, match="has no key of a layer"):
            import_adapter(path, layout="diffusers", allow_unmatched=True)
