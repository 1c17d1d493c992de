"""Pictures that are there, as they are to be evaluated: with what qrlora wrote into them of how they were made."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qrlora.analysis import short_names
from qrlora.blend.provenance import Provenance, SampleProvenance, SheetProvenance, has_chunk, read_chunk
from qrlora.blend.sheet import span
from qrlora.data import open_picture, picture_files
from qrlora.errors import QrloraError
from qrlora.evaluation import Sample

SHEET = "blend.png"
_REPORT = "report.json"
_MOST_WORDS = 60


@dataclass(frozen=True)
class Read:
    """Pictures, and what their own files say of the pictures they were made from.

    Attributes:
        samples: each picture once, in the order given.
        content, style: what a blend was made from, where that is still there.
        notes: what a reader of a report has to know of the choice.
    """

    samples: list[Sample]
    content: Path | None = None
    style: Path | None = None
    notes: list[str] = field(default_factory=list[str])


def read_samples(paths: Sequence[Path], text: str | None = None) -> Read:
    """The pictures of files and folders; a blend's folder or sheet stands for its single pictures.

    Pictures made with the same adapters at the same weights are one group, named by them; validation pictures of a
    training are grouped by step, others by their folder. Of pictures that were made alike the first is taken.

    Args:
        paths: picture files, folders of them, folders of `qrlora blend`.
        text: what all of them should show, in plain words.

    Raises:
        QrloraError: nothing there, no picture, one that cannot be read, a sheet whose pictures are gone.
    """
    files: list[tuple[Path, str]] = []
    sources: dict[str, Path] = {}
    notes: list[str] = []
    for path in paths:
        sheet = _sheet_at(path)
        if sheet is None:
            where = path.resolve().name if path.is_dir() else "pictures"
            files += [(file, where) for file in picture_files(path, "pictures")]
            continue
        files += [(file, "pictures") for file in _pictures_of(sheet)]
        found, missing = _sources(sheet.parent / _REPORT)
        sources |= found
        notes += missing
    chunks = [(file, where, read_chunk(file) if has_chunk(file) else None) for file, where in files]
    kept = [entry for entry in chunks if not isinstance(entry[2], SheetProvenance)]
    if not kept:
        raise QrloraError(f"{', '.join(map(str, paths))}: only sheets of pictures; give the single pictures.")
    different = _without_copies(kept)
    if len(different) < len(kept):
        notes.append(f"{len(kept) - len(different)} pictures were made just like another one and are left out.")
    return Read(_samples(different, text), sources.get("content"), sources.get("style"), notes)


def reference_samples(paths: Sequence[Path], option: str) -> list[Sample]:
    """Pictures to compare with, of files and folders, named by their files.

    Raises:
        QrloraError: nothing there, or no picture; it names the option.
    """
    files = [file for path in paths for file in picture_files(path, option)]
    names = short_names([file.with_suffix("") for file in files])
    return [Sample(name, open_picture(file).rgb) for name, file in zip(names, files, strict=True)]


def truth_samples(path: Path, pictures: Sequence[Sample]) -> dict[str, Sample]:
    """The true picture of each picture: one for all, or those of a folder by the same names.

    Raises:
        QrloraError: nothing there, or a picture that the folder has no true one of.
    """
    found = {file.stem: file for file in picture_files(path, "--truth")}
    if path.is_file():
        (file,) = found.values()
        true = Sample(file.stem, open_picture(file).rgb)
        return dict.fromkeys((each.name for each in pictures), true)
    lacking = [each.name for each in pictures if each.name not in found]
    if lacking:
        raise QrloraError(
            f"--truth {path} has no picture called {lacking[0]}; give one file for all, or one of each picture's name."
        )
    return {each.name: Sample(each.name, open_picture(found[each.name]).rgb) for each in pictures}


Entry = tuple[Path, str, Provenance | SheetProvenance | SampleProvenance | None]


def _sheet_at(path: Path) -> Path | None:
    """A blend's sheet, where `path` is one or a folder that holds one."""
    file = path / SHEET if path.is_dir() else path
    return file if file.is_file() and has_chunk(file) and isinstance(read_chunk(file), SheetProvenance) else None


def _pictures_of(sheet: Path) -> list[Path]:
    chunk = read_chunk(sheet)
    assert isinstance(chunk, SheetProvenance)
    files = [sheet.parent / name for name in chunk.pictures]
    lacking = next((file for file in files if not file.is_file()), None)
    if lacking is not None:
        raise QrloraError(f"{sheet} is of pictures of which {lacking} is not there; blend again, or give others.")
    # Of pictures made alike the first is kept, which is to be the grid's and not the base's or the merge's.
    return sorted(files, key=lambda file: not file.stem.startswith("merge-"))


def _sources(report: Path) -> tuple[dict[str, Path], list[str]]:
    """The pictures that a blend's adapters were trained on, and notes of those that are not here."""
    try:
        adapters = json.loads(report.read_text(encoding="utf-8"))["adapters"]
        told = {role: str(adapters[role]["source"]) for role in ("content", "style")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}, [f"{report} does not tell what the blend was made from."]
    found: dict[str, Path] = {}
    notes: list[str] = []
    for role, source in told.items():
        place = next((path for path in (Path(source), report.parent / source) if path.exists()), None)
        if place is None or place.suffix == ".safetensors" or (place / "adapter_config.json").exists():
            notes.append(f"The {role} is of {source}, which is no picture here; --{role} names one.")
        else:
            found[role] = place
    return found, notes


def _without_copies(entries: Sequence[Entry]) -> list[Entry]:
    kept: list[Entry] = []
    seen: set[str] = set()
    for file, where, chunk in entries:
        if isinstance(chunk, Provenance):
            made = chunk.model_dump(mode="json", exclude={"model", "device", "dtype", "versions", "adapters"})
            made["adapters"] = [(use.sha256, use.weight, use.timesteps) for use in chunk.adapters]
            key = json.dumps(made, sort_keys=True)
        else:
            key = str(file.resolve())
        if key not in seen:
            seen.add(key)
            kept.append((file, where, chunk))
    return kept


def _samples(entries: Sequence[Entry], text: str | None) -> list[Sample]:
    labels = _adapter_labels(entries)
    prompts = Counter(chunk.prompt for _, _, chunk in entries if isinstance(chunk, Provenance))
    common = prompts.most_common(1)[0][0] if prompts else None
    names = short_names([file.with_suffix("") for file, _, _ in entries])
    samples: list[Sample] = []
    for name, (file, where, chunk) in zip(names, entries, strict=True):
        group, weights = where, dict[str, float]()
        if isinstance(chunk, Provenance):
            group, weights = _made_with(chunk, labels)
            if chunk.prompt != common:
                group += f", “{_shortened(chunk.prompt)}”"
        elif isinstance(chunk, SampleProvenance):
            group = f"step {chunk.step}" if chunk.step else "base"
        told = (chunk.prompt, chunk.seed) if isinstance(chunk, Provenance | SampleProvenance) else (None, None)
        samples.append(Sample(name, open_picture(file).rgb, group, *told, text, weights))
    return samples


def _adapter_labels(entries: Sequence[Entry]) -> dict[str, str]:
    """What to call each adapter, by its sha256: the shortest end of a path it was used from."""
    files: dict[str, Path] = {}
    for file, _, chunk in entries:
        if isinstance(chunk, Provenance):
            for use in chunk.adapters:
                files.setdefault(use.sha256, (file.parent / use.file).resolve())
    return dict(zip(files, short_names(list(files.values())), strict=True))


def _made_with(chunk: Provenance, labels: Mapping[str, str]) -> tuple[str, dict[str, float]]:
    """A group's name, and the weight of every adapter of the set, 0 where it was left out."""
    weights = dict.fromkeys(labels.values(), 0.0)
    parts: list[str] = []
    for use in chunk.adapters:
        label = labels[use.sha256]
        weights[label] += use.weight
        parts.append(f"{label} {use.weight:g}{f' at {span(use.timesteps)}' if use.timesteps else ''}")
    by = f" by {chunk.method.name}" if chunk.method is not None else ""
    return (", ".join(parts) or "base") + by, weights


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_WORDS else f"{text[: _MOST_WORDS - 1]}…"
