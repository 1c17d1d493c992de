"""Build the emoji data set: `python -m tools.emoji.build --output data/emoji.npz --size 64`."""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from tools.emoji.names import Content, Slugs, coded_icons, contents, key_of, match, slug_table
from tools.emoji.sources import STYLES, SourceError, Style, fetch, packages, read_folder, read_json

FILL = 0.92
OVERSAMPLE = 4
REFERENCE_SIZE = 64
ALPHA_FLOOR = 8
INK_STEP = 32
MIN_INK = 0.01
HELD_OUT = 240
DEV = 80
MIN_STYLES = 9


@dataclass(frozen=True)
class Drawing:
    """One picture to render: a whole SVG text, or the bytes of a raster file."""

    style: int
    key: str
    data: str | bytes
    flip: bool = False


def iconify_svg(icon: Mapping[str, Any], sheet: Mapping[str, Any]) -> str:
    """A whole SVG of one icon of an iconify set."""
    box = [icon.get(name, sheet.get(name, default)) for name, default in
           (("left", 0), ("top", 0), ("width", 16), ("height", 16))]  # fmt: skip
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {head} viewBox="{box[0]} {box[1]} {box[2]} {box[3]}">{icon["body"]}</svg>'


def resolve(slug: str, sheet: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool] | None:
    """The icon a slug leads to through aliases, and whether it is mirrored; none if it is turned or missing."""
    flip = False
    while slug not in sheet["icons"]:
        alias = sheet.get("aliases", {}).get(slug)
        if alias is None or alias.get("rotate") or alias.get("vFlip"):
            return None
        flip ^= bool(alias.get("hFlip"))
        slug = alias["parent"]
    return sheet["icons"][slug], flip


def iconify_drawings(index: int, style: Style, tarball: Path, slugs: Slugs) -> Iterator[Drawing]:
    """Every wanted picture of an iconify set."""
    sheet = read_json(tarball, "package/icons.json")
    if style.coded:
        keys = {key: slug for slug, key in coded_icons(tarball).items()}
    else:
        plain = {name: alias["parent"] for name, alias in sheet.get("aliases", {}).items() if set(alias) == {"parent"}}
        keys = match(sheet["icons"], plain, slugs, style.squashed)
    for key, slug in keys.items():
        icon = resolve(slug, sheet) if key in slugs.wanted else None
        if icon is not None:
            yield Drawing(index, key, iconify_svg(icon[0], sheet), icon[1])


def file_drawings(index: int, style: Style, tarball: Path, slugs: Slugs) -> Iterator[Drawing]:
    """Every wanted picture of a set that has one file per code point."""
    seen: set[str] = set()
    for stem, data in read_folder(tarball, style.folder):
        key = key_of(stem)
        if key in slugs.wanted and key not in seen:
            seen.add(key)
            yield Drawing(index, key, data.decode() if style.format == "svg-files" else data)


def drawings(tarballs: Mapping[str, Path], slugs: Slugs) -> Iterator[Drawing]:
    """Every picture of every style."""
    for index, style in enumerate(STYLES):
        reader = iconify_drawings if style.format == "iconify" else file_drawings
        yield from reader(index, style, tarballs[style.package.name], slugs)


def rasterise(drawing: Drawing, size: int) -> Image.Image:
    """The picture with alpha, several times larger than asked for where it is drawn from SVG."""
    if isinstance(drawing.data, bytes):
        return Image.open(io.BytesIO(drawing.data)).convert("RGBA")
    side = size * OVERSAMPLE
    png = bytes(resvg_py.svg_to_bytes(svg_string=drawing.data, width=side, height=side))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def place(picture: Image.Image, size: int) -> np.ndarray | None:
    """Crop to what is visible, scale the longest side to 92 %, centre on white; none if nothing is visible."""
    box = picture.getchannel("A").point(lambda alpha: 255 if alpha >= ALPHA_FLOOR else 0).getbbox()
    if box is None:
        return None
    cropped = picture.crop(box)
    scale = FILL * size / max(cropped.size)
    width, height = (max(1, round(side * scale)) for side in cropped.size)
    small = cropped.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(small, ((size - width) // 2, (size - height) // 2))
    return np.asarray(canvas.convert("RGB"))


def near_blank(picture: np.ndarray) -> bool:
    """Whether almost nothing differs from white."""
    return float((picture.min(axis=2) < 255 - INK_STEP).mean()) < MIN_INK


@dataclass(frozen=True)
class Rendered:
    """One picture, and the digest of the same drawing at the reference size."""

    style: int
    key: str
    picture: np.ndarray
    digest: bytes


def draw(drawing: Drawing, size: int) -> np.ndarray | None:
    """The placed picture, mirrored where it should be; none where nothing is visible or it cannot be read."""
    try:
        picture = place(rasterise(drawing, size), size)
    except (ValueError, OSError):
        return None
    return picture[:, ::-1].copy() if picture is not None and drawing.flip else picture


def render(job: tuple[Drawing, int]) -> Rendered | None:
    """One picture, or none where it is near-blank; judged at the reference size, so that all sizes split alike."""
    drawing, size = job
    reference = draw(drawing, REFERENCE_SIZE)
    if reference is None or near_blank(reference):
        return None
    picture = reference if size == REFERENCE_SIZE else draw(drawing, size)
    digest = hashlib.sha256(reference.tobytes()).digest()
    return None if picture is None else Rendered(drawing.style, drawing.key, picture, digest)


def render_all(jobs: Sequence[Drawing], size: int, workers: int) -> list[Rendered]:
    """Render on every core, with progress."""
    done: list[Rendered] = []
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        results = pool.imap_unordered(render, ((job, size) for job in jobs), chunksize=32)
        for count, result in enumerate(results, 1):
            if result is not None:
                done.append(result)
            if count % 1000 == 0 or count == len(jobs):
                left = (time.monotonic() - start) / count * (len(jobs) - count)
                print(f"rendered {count}/{len(jobs)}, {left:.0f} s left", file=sys.stderr, flush=True)
    return done


def hash_order(key: str) -> str:
    """The fixed order of the contents for the splits."""
    return hashlib.sha256(key.encode()).hexdigest()


def twins(rendered: Sequence[Rendered]) -> set[str]:
    """Contents that some style draws exactly as it draws another content."""
    same: defaultdict[tuple[int, bytes], set[str]] = defaultdict(set)
    for one in rendered:
        same[one.style, one.digest].add(one.key)
    return {key for keys in same.values() if len(keys) > 1 for key in keys}


def split(styles_of: Mapping[str, int], barred: set[str]) -> dict[str, str]:
    """Key to `train`, `dev` or `test`: held out are the first by hash among those in enough styles and not barred."""
    fit = sorted((key for key, count in styles_of.items() if count >= MIN_STYLES and key not in barred), key=hash_order)
    held = {key: "dev" if rank < DEV else "test" for rank, key in enumerate(fit[:HELD_OUT])}
    return {key: held.get(key, "train") for key in styles_of}


def describe(keys: Sequence[str], known: Mapping[str, Content], splits: Mapping[str, str], size: int) -> dict[str, Any]:
    """Everything of the data set that is not pictures."""
    return {
        "version": 1,
        "size": size,
        "styles": [
            {"name": style.name, "role": style.role, "licence": style.licence, "share_alike": style.share_alike,
             "source": f"{style.package.name}@{style.package.version}"}
            for style in STYLES
        ],
        "contents": [
            {"key": key, "name": known[key].name, "category": known[key].category, "split": splits[key]} for key in keys
        ],
        "sources": {f"{package.name}@{package.version}": f"sha512-{package.sha512}" for package in packages()},
    }  # fmt: skip


def save(path: Path, rendered: Sequence[Rendered], keys: Sequence[str], meta: Any) -> None:
    """Write the one file, without pickled objects, moving it into place when whole."""
    order = {key: index for index, key in enumerate(keys)}
    rows = sorted(rendered, key=lambda one: (order[one.key], one.style))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part.npz")
    np.savez_compressed(
        part,
        pictures=np.stack([one.picture for one in rows]),
        style=np.array([one.style for one in rows], dtype=np.int16),
        content=np.array([order[one.key] for one in rows], dtype=np.int32),
        meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
    )
    os.replace(part, path)


def report(rendered: Sequence[Rendered], barred: set[str]) -> None:
    """Print the counts per style and how many contents many styles share."""
    per_style = Counter(one.style for one in rendered)
    per_key = Counter(one.key for one in rendered)
    for index, style in enumerate(STYLES):
        print(f"{style.name:16} {per_style[index]}")
    shared = {least: sum(count >= least for count in per_key.values()) for least in range(len(STYLES), 6, -1)}
    print(f"contents {len(per_key)}, pictures {len(rendered)}, contents drawn just like another {len(barred)}")
    print("in at least n styles:", ", ".join(f"{least}: {count}" for least, count in shared.items()))


def build(output: Path, size: int, folder: Path, workers: int) -> None:
    """Fetch, render, split and write."""
    tarballs = fetch(folder)
    known = contents(tarballs)
    jobs = list(drawings(tarballs, slug_table(tarballs, known)))
    rendered = render_all(jobs, size, workers)
    styles_of = Counter(one.key for one in rendered)
    keys = [key for key in known if key in styles_of]
    barred = twins(rendered)
    save(output, rendered, keys, describe(keys, known, split(styles_of, barred), size))
    report(rendered, barred)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.emoji.build", description="Build the emoji data set.")
    parser.add_argument("--output", type=Path, default=Path("data/emoji.npz"), help="file to write")
    parser.add_argument("--size", type=int, choices=(64, 128), default=64, help="side of the pictures in pixels")
    parser.add_argument("--sources", type=Path, default=Path("data/sources"), help="folder of the npm tarballs")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render")
    options = parser.parse_args(arguments)
    try:
        build(options.output, options.size, options.sources, options.workers)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
