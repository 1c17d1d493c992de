"""Code point keys, English names, and the way from an icon's slug to its code points."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.emoji.sources import CLDR, EMOJIBASE, FLUENT_FLAT, NOTO, TWEMOJI, read_json

VARIATION = "fe0f"
SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
DROPPED_CATEGORIES = frozenset({"component", "flags"})


@dataclass(frozen=True)
class Content:
    """One emoji: its code point key, English name and category."""

    key: str
    name: str
    category: str


def key_of(codes: str) -> str:
    """Key of code points in hex joined by `-`, `_` or spaces: lower case, at least 4 digits, `fe0f` dropped."""
    parts = re.split(r"[-_ ]+", codes.strip().lower())
    return "-".join(part.lstrip("0").zfill(4) for part in parts if part.lstrip("0") != VARIATION)


def key_of_text(text: str) -> str:
    """Key of the characters themselves."""
    return key_of("-".join(f"{ord(letter):x}" for letter in text))


def text_of_key(key: str) -> str:
    """The characters of a key."""
    return "".join(chr(int(code, 16)) for code in key.split("-"))


def has_skin_tone(key: str) -> bool:
    """Whether a key names a skin tone variant."""
    return not SKIN_TONES.isdisjoint(key.split("-"))


def slug_of(name: str) -> str:
    """A name as icon sets write it: lower case, accents and apostrophes dropped, words joined by `-`."""
    plain = unicodedata.normalize("NFKD", name.lower())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    plain = re.sub(r"['’.]", "", plain).replace("&", " and ")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def squash(name: str) -> str:
    """A name with everything but letters and digits dropped."""
    return slug_of(name).replace("-", "")


def contents(tarballs: Mapping[str, Path]) -> dict[str, Content]:
    """Every emoji without skin tones, flags and components, by key, in Unicode's order."""
    base = tarballs[EMOJIBASE.name]
    groups = {group["order"]: group["key"] for group in read_json(base, "package/en/messages.json")["groups"]}
    found: dict[str, Content] = {}
    for entry in sorted(read_json(base, "package/en/data.json"), key=lambda entry: entry.get("order", 0)):
        category = groups.get(entry.get("group"), "component")
        key = key_of(entry["hexcode"])
        if category not in DROPPED_CATEGORIES and not has_skin_tone(key):
            found[key] = Content(key, entry["label"].lower(), category)
    return found


class Slugs:
    """Slug to key: what is added first wins."""

    def __init__(self, wanted: Iterable[str]) -> None:
        self.wanted = frozenset(wanted)
        self.keys: dict[str, str] = {}
        self.squashed: dict[str, str] = {}

    def add(self, name: str, key: str) -> None:
        """Learn one name of a key, unless the name is taken or the key is not wanted."""
        if key in self.wanted:
            self.keys.setdefault(slug_of(name), key)
            self.squashed.setdefault(squash(name), key)

    def find(self, slug: str, squashed: bool = False) -> str | None:
        """The key of a slug, or none."""
        return self.squashed.get(squash(slug)) if squashed else self.keys.get(slug_of(slug))


def unicode_name(key: str) -> str | None:
    """Unicode's own name of a single code point."""
    return unicodedata.name(text_of_key(key), None) if "-" not in key else None


def slug_table(tarballs: Mapping[str, Path], wanted: Mapping[str, Content]) -> Slugs:
    """All known names: CLDR's, emojibase's, chars.json of the coded sets, Unicode's, and last the sets' aliases."""
    slugs = Slugs(wanted)
    annotations = read_json(tarballs[CLDR.name], "package/annotations/en/annotations.json")
    for text, entry in annotations["annotations"]["annotations"].items():
        for name in entry.get("tts", ()):
            slugs.add(name, key_of_text(text))
    for content in wanted.values():
        slugs.add(content.name, content.key)
    coded = {package.name: coded_icons(tarballs[package.name]) for package in (NOTO, TWEMOJI, FLUENT_FLAT)}
    for icons in coded.values():
        for slug, key in icons.items():
            slugs.add(slug, key)
    for key in wanted:
        if name := unicode_name(key):
            slugs.add(name, key)
    for package, icons in coded.items():
        for alias, entry in read_json(tarballs[package], "package/icons.json").get("aliases", {}).items():
            if entry["parent"] in icons and set(entry) == {"parent"}:
                slugs.add(alias, icons[entry["parent"]])
    return slugs


def coded_icons(tarball: Path) -> dict[str, str]:
    """Icon slug to key, from the chars.json of an iconify set."""
    return {slug: key_of(codes) for codes, slug in read_json(tarball, "package/chars.json").items()}


def match(icons: Iterable[str], aliases: Mapping[str, str], slugs: Slugs, squashed: bool = False) -> dict[str, str]:
    """Key to icon slug: icons by their own name first, then by the aliases that lead to them."""
    found: dict[str, str] = {}
    known = set(icons)
    for slug in sorted(known):
        if key := slugs.find(slug, squashed):
            found.setdefault(key, slug)
    taken = set(found.values())
    for alias, parent in sorted(aliases.items()):
        if parent in known and parent not in taken and (key := slugs.find(alias, squashed)):
            found.setdefault(key, parent)
    return found
