"""Keys, slugs and splits, the pinned sources, and reading the file back; no network."""

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from tools.emoji import build, sources
from tools.emoji.dataset import Emoji
from tools.emoji.names import Content, Slugs, has_skin_tone, key_of, key_of_text, match, slug_of, squash, text_of_key


@pytest.mark.parametrize(
    ("codes", "key"),
    [
        ("1F34E", "1f34e"),
        ("2764-FE0F", "2764"),
        ("23-FE0F-20E3", "0023-20e3"),
        ("1f3f4_200d_2620_fe0f", "1f3f4-200d-2620"),
    ],
)
def test_key_of(codes: str, key: str) -> None:
    assert key_of(codes) == key
    assert key_of_text(text_of_key(key)) == key


def test_skin_tones_are_told() -> None:
    assert has_skin_tone("1f44d-1f3fd")
    assert not has_skin_tone("1f44d")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("red apple", "red-apple"),
        ("Japanese “here” button", "japanese-here-button"),
        ("woman’s hat", "womans-hat"),
        ("piñata", "pinata"),
        ("Mrs. Claus", "mrs-claus"),
        ("keycap: 1", "keycap-1"),
    ],
)
def test_slug_of(name: str, slug: str) -> None:
    assert slug_of(name) == slug
    assert squash(name) == slug.replace("-", "")


def test_slugs_keep_the_first_name_and_only_what_is_wanted() -> None:
    slugs = Slugs(["1f34e", "1f43b"])
    slugs.add("red apple", "1f34e")
    slugs.add("red apple", "1f43b")
    slugs.add("flag", "1f1e6")
    assert slugs.find("red-apple") == "1f34e"
    assert slugs.find("redapple") is None
    assert slugs.find("redapple", squashed=True) == "1f34e"
    assert slugs.find("flag") is None


def test_match_prefers_own_names_to_aliases() -> None:
    slugs = Slugs(["1f43b", "1f34e"])
    slugs.add("bear", "1f43b")
    slugs.add("red apple", "1f34e")
    assert match(["bear-face"], {"bear": "bear-face"}, slugs) == {"1f43b": "bear-face"}
    assert match(["bear", "old-bear"], {"bear": "old-bear"}, slugs) == {"1f43b": "bear"}


def test_split_is_fixed_and_leaves_rare_and_barred_contents_to_training() -> None:
    counts = {f"{code:x}": 12 if code % 2 else 3 for code in range(0x1F300, 0x1F600)}
    barred = {"1f301", "1f303"}
    splits = build.split(counts, barred)
    held = [key for key, name in splits.items() if name != "train"]
    assert len(held) == 240
    assert list(splits.values()).count("dev") == 80
    assert all(counts[key] >= 9 and key not in barred for key in held)
    assert splits == build.split(dict(reversed(counts.items())), barred)
    latest_dev = max(build.hash_order(key) for key, name in splits.items() if name == "dev")
    assert all(build.hash_order(key) > latest_dev for key, name in splits.items() if name == "test")


def test_resolve_follows_aliases_and_mirrors() -> None:
    sheet = {"icons": {"left": {"body": "<g/>"}}, "aliases": {"right": {"parent": "left", "hFlip": True},
             "west": {"parent": "left"}, "down": {"parent": "left", "rotate": 1}}}  # fmt: skip
    assert build.resolve("right", sheet) == ({"body": "<g/>"}, True)
    assert build.resolve("west", sheet) == ({"body": "<g/>"}, False)
    assert build.resolve("down", sheet) is None
    assert build.resolve("gone", sheet) is None


BOX = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><rect width="4" height="2" fill="{}"/></svg>'


@pytest.mark.parametrize("size", [64, 128])
def test_render_centres(size: int) -> None:
    rendered = build.render((build.Drawing(0, "1f34e", BOX.format("red")), size))
    assert rendered is not None
    assert rendered.picture.shape == (size, size, 3)
    rows, columns = np.nonzero(rendered.picture.min(axis=2) < 128)
    assert columns.max() - columns.min() + 1 == pytest.approx(0.92 * size, abs=1.5)
    assert rows.mean() == pytest.approx((size - 1) / 2, abs=1)
    assert columns.mean() == pytest.approx((size - 1) / 2, abs=1)


@pytest.mark.parametrize("data", [BOX.format("white"), BOX.format("none"), b"not a picture", "not an svg"])
def test_render_drops_the_blank_and_the_broken(data: str | bytes) -> None:
    assert build.render((build.Drawing(0, "1f34e", data), 64)) is None


def test_twins_are_the_same_at_every_size() -> None:
    jobs = [build.Drawing(0, key, BOX.format(fill)) for key, fill in (("a", "red"), ("b", "#f00"), ("c", "blue"))]
    for size in (64, 128):
        rendered = [one for job in jobs if (one := build.render((job, size))) is not None]
        assert build.twins(rendered) == {"a", "b"}


def test_training_styles_are_free_of_share_alike() -> None:
    assert all(not style.share_alike for style in sources.STYLES if style.role == "train")
    assert all(style.share_alike == ("SA" in style.licence) for style in sources.STYLES)
    assert len({style.name for style in sources.STYLES}) == 12
    assert all(len(package.sha512) == 88 for package in sources.packages())


@pytest.fixture
def tarball(tmp_path: Path) -> Path:
    path = tmp_path / "some-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("package/a/1f34e.svg", "package/a/b/deep.svg", "../outside.svg"):
            member = tarfile.TarInfo(name)
            member.size = 2
            archive.addfile(member, BytesIO(b"ok"))
        link = tarfile.TarInfo("package/a/link.svg")
        link.type, link.linkname = tarfile.SYMTYPE, "../outside.svg"
        archive.addfile(link)
    return path


def test_tarballs_are_read_in_place(tarball: Path) -> None:
    assert list(sources.read_folder(tarball, "package/a/")) == [("1f34e", b"ok")]
    with pytest.raises(sources.SourceError, match="no file"):
        sources.read(tarball, "package/gone.json")


def test_a_wrong_hash_is_refused(
    tarball: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = sources.Package("some", "1.0.0", "A" * 86 + "==")
    sources.check(sources.Package("some", "1.0.0", sources.digest(tarball)), tarball)
    monkeypatch.setattr(sources, "packages", lambda: (package,))
    assert build.main(["--sources", str(tarball.parent), "--output", str(tarball.parent / "out.npz")]) == 2
    assert "is not the pinned some@1.0.0" in capsys.readouterr().err
    assert not (tarball.parent / "out.npz").exists()


def test_file_reads_back(tmp_path: Path) -> None:
    names = {"1f34e": "red apple", "1f431": "cat face"}
    known = {key: Content(key, name, "things") for key, name in names.items()}
    pictures = {("1f34e", 0): 1, ("1f34e", 7): 2, ("1f431", 0): 3}
    rendered = [
        build.Rendered(style, key, np.full((64, 64, 3), value, dtype=np.uint8), b"")
        for (key, style), value in pictures.items()
    ]
    meta = build.describe(list(known), known, {"1f34e": "train", "1f431": "dev"}, 64)
    build.save(tmp_path / "emoji.npz", rendered, list(known), meta)
    emoji = Emoji.load(tmp_path / "emoji.npz")
    assert (len(emoji), emoji.size, emoji.name("1f34e")) == (3, 64, "red apple")
    assert emoji.pictures([("1f431", "noto"), ("1f34e", "openmoji")])[:, 0, 0, 0].tolist() == [3, 2]
    assert ("1f431", "openmoji") not in emoji
    assert emoji.styles_of("1f34e") == ("noto", "openmoji")
    assert (emoji.train_contents, emoji.dev_contents, emoji.test_contents) == (("1f34e",), ("1f431",), ())
    assert len(emoji.train_styles) == 6
    assert "openmoji" in emoji.held_out_styles
    assert emoji.pairs(styles=["noto"]) == [("1f34e", "noto"), ("1f431", "noto")]
