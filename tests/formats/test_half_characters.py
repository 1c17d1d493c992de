"""Lone surrogates in headers."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qrlora.errors import QrloraError
from qrlora.formats import import_adapter, write_adapter
from tests.real_layers import real_adapter


@pytest.mark.parametrize("escaped", [True, False], ids=["escaped", "raw"])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("key", r"lora_A\.weight\\ud800 is not the name of a tensor"),
        ("dtype", r"has dtype \\ud800"),
        ("shape", "malformed"),
        ("metadata", "not a readable safetensors file"),
        ("metadata key", "not a readable safetensors file"),
        ("ours", "the header key qrlora has half a character"),
        ("ours, twice escaped", "the header key qrlora has half a character"),
        ("diffusers' config", "the header key lora_adapter_metadata has half a character"),
    ],
)
def test_half_characters(tmp_path: Path, place: str, message: str, escaped: bool) -> None:
    """Lone surrogates: JSON can spell them, but they are no text, and nothing could print or write them."""
    half = "\ud800"
    path = write_adapter(real_adapter("flux", "attn.to_q"), tmp_path / "a.safetensors", "diffusers")
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    key = next(key for key in sorted(header) if key != "__metadata__")
    changes: dict[str, Callable[[], object]] = {
        "key": lambda: header.update({key + half: header.pop(key)}),
        "dtype": lambda: header[key].update(dtype=half),
        "shape": lambda: header[key].update(shape=[half]),
        "metadata": lambda: metadata.update({"modelspec.title": half}),
        "metadata key": lambda: metadata.update({half: "dog"}),
        "ours": lambda: metadata.update(qrlora=f'{{"rank": 2, "base_model": "{half}"}}'),
        "ours, twice escaped": lambda: metadata.update(qrlora=r'{"rank": 2, "trigger_words": ["\ud800"]}'),
        "diffusers' config": lambda: metadata.update(lora_adapter_metadata=r'{"transformer.bias": "\ud800"}'),
    }
    changes[place]()
    text = json.dumps(header, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    if not escaped and b"\xed\xa0\x80" in text:
        message = "not UTF-8"
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(QrloraError, match=message) as caught:
        import_adapter(path)
    str(caught.value).encode()  # it can be printed
