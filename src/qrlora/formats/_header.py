"""Our own part of a file's header: provenance as JSON, which stock loaders ignore."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from qrlora.errors import QrloraError
from qrlora.formats._adapter import DENOISERS, FORMAT_VERSION, TEXT_ENCODERS, Adapter, Component, Header

HEADER_KEY = "qrlora"
COMPONENT_KEY = "qrlora_component"
_LONGEST = -1.2345678901234567e-300  # no float is longer as JSON


def header_metadata(adapter: Adapter) -> dict[str, str]:
    """The header as JSON under `qrlora`, and those of text encoders under `qrlora.text_encoder` and so on."""
    headers = {HEADER_KEY: adapter.header} | {
        f"{HEADER_KEY}.{component}": companion.header for component, companion in adapter.companions.items()
    }
    return {
        key: json.dumps(header.model_dump(mode="json"), sort_keys=True)
        for key, header in headers.items()
        if header is not None
    }


def widest(header: Header | None) -> Header | None:
    """The header with norms of merged parts that no others are longer than, as text.

    A merge of large files knows them only when its layers were written, after the header; files have the same room for
    them however they were made.
    """
    if header is None or header.merged_from is None:
        return header
    parts = [part | {"norm": _LONGEST} if isinstance(part.get("norm"), float) else part for part in header.merged_from]
    return header.model_copy(update={"merged_from": parts})


def read_header(source: Path, metadata: Mapping[str, str], companion: str | None = None) -> Header | None:
    """The header of a file, or of a companion in it.

    Raises:
        QrloraError: it is damaged, or of a newer version.
    """
    key = HEADER_KEY if companion is None else f"{HEADER_KEY}.{companion}"
    if key not in metadata:
        return None
    values = json_object(source, metadata[key], f"the header key {key}")
    version = values.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise QrloraError(
            f"{source} has format version {version}; this qrlora reads up to {FORMAT_VERSION}: update qrlora."
        )
    try:
        return Header.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise QrloraError(f"{source}: the header's {where or 'content'} is not valid: {first['msg']}.") from error


def stored_component(metadata: Mapping[str, str]) -> Component | None:
    """The component a file says it belongs to; None where it says none, or one that is not known."""
    stored = metadata.get(COMPONENT_KEY)
    return next((known for known in (*DENOISERS, *TEXT_ENCODERS) if known == stored), None)


def json_object(source: Path, text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QrloraError(f"{source}: {what} is not JSON.") from error
    if not isinstance(value, dict):
        raise QrloraError(f"{source}: {what} is not a JSON object.")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise QrloraError(f"{source}: {what} has half a character (a lone surrogate), which is no text.") from error
    return cast(dict[str, Any], value)
