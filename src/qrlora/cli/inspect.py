"""`qrlora inspect`: what an adapter file or a picture says of itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict

from qrlora.cli._options import parse_options

if TYPE_CHECKING:
    from qrlora.formats import Header


class InspectOptions(BaseModel):
    """Show what is in an adapter file, a peft folder, or a picture made by qrlora."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[Path, tyro.conf.Positional]
    """Adapter file, peft folder, or PNG."""
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Everything, as JSON."""


def run(arguments: Sequence[str]) -> None:
    """Parse and print."""
    options = parse_options(InspectOptions, "inspect", arguments)
    facts = _picture(options.file) if options.file.suffix.lower() == ".png" else _adapter(options.file, options.json_)
    if options.json_:
        print(json.dumps(facts, indent=1))
        return
    shown = {key: value for key, value in facts.items() if value not in (None, [], {}, "")}
    width = max(map(len, shown))
    for key, value in shown.items():
        print(f"{key:<{width}}  {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")


def _picture(path: Path) -> dict[str, Any]:
    from qrlora.blend.provenance import read_chunk

    return read_chunk(path).model_dump(mode="json")


def _adapter(path: Path, everything: bool) -> dict[str, Any]:
    from qrlora.blend.provenance import file_hash
    from qrlora.blend.report import trainable
    from qrlora.formats import is_coefficients, read_adapter, read_metadata

    if path.is_file() and is_coefficients(read_metadata(path)):
        return _coefficients(path, everything)
    adapter = read_adapter(path)
    pairs, header = adapter.layers.values(), adapter.header
    ranks = sorted({pair.rank for pair in pairs})
    facts: dict[str, Any] = {
        "file": str(path),
        "sha256": file_hash(path),
        "component": adapter.component,
        "layers": len(pairs),
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "parameters": sum(pair.A.numel() + pair.B.numel() for pair in pairs),
        "trained": trainable(adapter),
        "update_norm": float(sum(float(pair.delta().double().square().sum()) for pair in pairs) ** 0.5),
    }
    if everything:
        facts["shapes"] = {name: list(pair.shape) for name, pair in adapter.layers.items()}
    if header is None:
        return facts | {"header": "none: a LoRA of another tool"}
    if everything:
        return facts | {"header": header.model_dump(mode="json")}
    return facts | _brief(header)


def _coefficients(path: Path, everything: bool) -> dict[str, Any]:
    """What a file without its bases can tell."""
    from qrlora.blend.provenance import file_hash
    from qrlora.formats import read_coefficients

    file = read_coefficients(path)
    header, parts = file.header, file.layers.values()
    ranks = sorted({part.fingerprint.shape[0] for part in parts})
    masked = sum(rank * (rank - 1) // 2 for rank in (part.fingerprint.shape[0] for part in parts))
    facts: dict[str, Any] = {
        "file": str(path),
        "sha256": file_hash(path),
        "kind": "coefficients only: needs the base to be used",
        "component": file.component,
        "layers": len(parts),
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "trained": sum(part.trained.numel() for part in parts) - (masked if header.mask == "upper" else 0),
    }
    if everything:
        shapes = {name: list(part.trained.shape) for name, part in file.layers.items()}
        return facts | {"header": header.model_dump(mode="json"), "coefficient_shapes": shapes}
    return facts | _brief(header) | {"fingerprint": header.fingerprint}


def _brief(header: "Header") -> dict[str, Any]:
    dumped = header.model_dump(mode="json")
    brief = {
        key: dumped[key] for key in ("basis", "side", "mask", "method", "base_model", "base_hash", "trigger_words")
    }
    brief["captions"] = (header.training or {}).get("captions")
    brief["merged_from"] = [
        {key: part.get(key) for key in ("weight", "basis", "rank", "trigger_words")}
        for part in header.merged_from or []
    ]
    return brief
