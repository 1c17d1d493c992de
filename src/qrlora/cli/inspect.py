"""`qrlora inspect`: what an adapter file or a picture says of itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qrlora.cli._files import FileOptions, base_weights
from qrlora.cli._options import parse_options

if TYPE_CHECKING:
    from qrlora.formats import Adapter, Header, Recognised

# What other tools write into a file's header that a user may want to know.
_METADATA = {
    "modelspec.title": "title",
    "modelspec.architecture": "architecture",
    "modelspec.trigger_phrase": "trigger_words",
    "ss_base_model_version": "base_model",
    "ss_sd_model_name": "base_model",
    "ss_network_module": "network_module",
    "ss_network_alpha": "lora_alpha",
}
_BRIEF = ("basis", "side", "band", "form", "mask", "method", "base_model", "base_hash", "trigger_words")
_LONGEST = 300


class InspectOptions(FileOptions):
    """Show what is in an adapter file of any tool, a peft folder, or a picture made by qrlora."""

    file: Annotated[Path, tyro.conf.Positional]
    """Adapter file, peft folder, or PNG."""
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Everything, as JSON."""
    layers: bool = False
    """Rank and norm of every layer instead of every block."""


def run(arguments: Sequence[str]) -> None:
    """Parse and print."""
    options = parse_options(InspectOptions, "inspect", arguments)
    if options.file.suffix.lower() == ".png":
        return _print(_picture(options.file), options.json_)
    return _adapter(options)


def _picture(path: Path) -> dict[str, Any]:
    from qrlora.blend.provenance import read_chunk

    return read_chunk(path).model_dump(mode="json")


def _adapter(options: InspectOptions) -> None:
    from qrlora.blend.provenance import file_hash
    from qrlora.formats import import_adapter, is_coefficients, read_metadata, recognise

    if options.file.is_file() and is_coefficients(read_metadata(options.file)):
        return _print(_coefficients(options.file, options.json_), options.json_)
    given: dict[str, Any] = {"layout": options.layout, "basis": options.basis, "lora_alpha": options.lora_alpha}
    given["top_k"] = options.top_k
    base = base_weights(options.model)
    found = recognise(options.file, base=base, **given)
    facts: dict[str, Any] = {"file": str(options.file), "sha256": file_hash(found.file.tensors_at)}
    facts |= {"format": found.layout.title, "evidence": found.evidence}
    if found.needs is not None:
        facts |= {
            "keys": len(found.file.entries),
            "layers": len(set(found.matched.values())),
            "unread": f"it {found.needs}",
        }
        return _print(facts | _metadata(found), options.json_)
    adapter = import_adapter(options.file, base=base, allow_unmatched=True, **given).adapter
    norms = {name: pair.norm() for name, pair in adapter.layers.items()}
    facts |= {"component": adapter.component} | _summary(adapter, norms)
    companions = {
        name: (companion, {layer: pair.norm() for layer, pair in companion.layers.items()})
        for name, companion in adapter.companions.items()
    }
    facts["companions"] = {
        name: _summary(*each) | (_own_facts(*each) if options.json_ else {}) for name, each in companions.items()
    }
    if options.json_:
        return _print(facts | _everything(adapter, found, norms), as_json=True)
    _print(facts | _provenance(adapter, found) | {"unmatched": list(found.unmatched)}, as_json=False)
    print()
    ranks = {name: pair.rank for name, pair in adapter.layers.items()}
    for name, (companion, theirs) in companions.items():
        ranks |= {f"{name}.{layer}": pair.rank for layer, pair in companion.layers.items()}
        norms |= {f"{name}.{layer}": norm for layer, norm in theirs.items()}
    return _table(ranks, norms, options.layers)


def _summary(adapter: "Adapter", norms: Mapping[str, float]) -> dict[str, Any]:
    from qrlora.adapter import trained_size

    ranks = sorted({pair.rank for pair in adapter.layers.values()})
    return {
        "layers": len(adapter.layers),
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "parameters": sum(pair.A.numel() + pair.B.numel() for pair in adapter.layers.values()),
        "trained": trained_size(adapter.alone()),
        "update_norm": _total(norms.values()),
    }


def _provenance(adapter: "Adapter", found: "Recognised") -> dict[str, Any]:
    header = adapter.header
    if header is None:
        return {"header": "none: a LoRA of another tool", **_metadata(found)}
    return _header_facts(header)


def _header_facts(header: "Header") -> dict[str, Any]:
    dumped = header.model_dump(mode="json")
    brief = {key: dumped.get(key) for key in _BRIEF}
    brief["captions"] = (header.training or {}).get("captions")
    brief["merged_from"] = [
        {key: part.get(key) for key in ("weight", "basis", "rank", "trigger_words")}
        for part in header.merged_from or []
    ]
    return brief


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
    return facts | _header_facts(header) | {"fingerprint": header.fingerprint}


def _everything(adapter: "Adapter", found: "Recognised", norms: Mapping[str, float]) -> dict[str, Any]:
    return {
        **_own_facts(adapter, norms),
        **(_metadata(found) if adapter.header is None else {}),
        "matched": dict(found.matched),
        "unmatched": list(found.unmatched),
    }


def _own_facts(adapter: "Adapter", norms: Mapping[str, float]) -> dict[str, Any]:
    """All that one component's adapter says of itself."""
    return {
        "header": adapter.header.model_dump(mode="json") if adapter.header is not None else None,
        "shapes": {name: list(pair.shape) for name, pair in adapter.layers.items()},
        "ranks": {name: pair.rank for name, pair in adapter.layers.items()},
        "norms": dict(norms),
    }


def _metadata(found: "Recognised") -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for key, name in _METADATA.items():
        if text := found.file.metadata.get(key):
            facts.setdefault(name, text[:_LONGEST])
    return facts


def _table(ranks_of: Mapping[str, int], norms: Mapping[str, float], every_layer: bool) -> None:
    """Rank and Frobenius norm of the update, a line a block (or a layer), and the layer that gives most of it."""
    groups: dict[str, list[str]] = {}
    for name in ranks_of:
        groups.setdefault(name if every_layer else _block(name), []).append(name)
    width = max(len(group) for group in groups)
    print(f"{'layer' if every_layer else 'block':<{width}}  {'rank':>9}  {'|dW|':>9}  largest")
    for group, names in groups.items():
        ranks = sorted({ranks_of[name] for name in names})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"
        largest = max(names, key=lambda name: norms[name])
        rest = f"{largest.removeprefix(group).strip('.')} {norms[largest]:.4g}" if len(names) > 1 else ""
        print(f"{group:<{width}}  {rank:>9}  {_total(norms[name] for name in names):>9.4g}  {rest}".rstrip())


def _block(name: str) -> str:
    """`transformer_blocks.0`, `down_blocks.1.attentions.0`: up to the last of the leading numbers.

    Of a text encoder, `text_encoder.text_model.encoder.layers.0`.
    """
    parts = name.split(".")
    if "layers" in parts:
        return ".".join(parts[: parts.index("layers") + 2])
    if len(parts) > 3 and parts[1].isdigit() and parts[3].isdigit():
        return ".".join(parts[:4])
    return ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() else parts[0]


def _total(norms: Any) -> float:
    return sum(norm**2 for norm in norms) ** 0.5


def _print(facts: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    from qrlora.formats import shown

    given: dict[str, Any] = {key: value for key, value in facts.items() if value not in (None, [], {}, "")}
    width = max(map(len, given))
    for key, value in given.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        print(f"{key:<{width}}  {text if text.isprintable() else shown(text)}")
