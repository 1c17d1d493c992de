"""The pinned npm packages the emoji come from: fetched, checked against their hashes, and read without extraction."""

import base64
import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Format = Literal["iconify", "svg-files", "webp-files"]
Role = Literal["train", "held-out"]


class SourceError(RuntimeError):
    """A package that cannot be fetched, or does not hold what it should."""


@dataclass(frozen=True)
class Package:
    """One npm package, pinned by version and by the sha512 of its tarball (npm's `integrity`, base64)."""

    name: str
    version: str
    sha512: str

    @property
    def tarball(self) -> str:
        """File name `npm pack` gives the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Style:
    """One drawn set: where its pictures lie, how they are keyed, and what may be done with them."""

    name: str
    package: Package
    licence: str
    format: Format
    share_alike: bool
    role: Role
    folder: str = ""
    coded: bool = False
    squashed: bool = False


NOTO = Package("@iconify-json/noto", "1.2.9",
    "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==")  # fmt: skip
TWEMOJI = Package("@iconify-json/twemoji", "1.2.5",
    "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==")  # fmt: skip
FLUENT_FLAT = Package("@iconify-json/fluent-emoji-flat", "1.2.6",
    "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==")  # fmt: skip
FLUENT_CONTRAST = Package("@iconify-json/fluent-emoji-high-contrast", "1.2.6",
    "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==")  # fmt: skip
FLUENT_3D = Package("@lobehub/fluent-emoji-3d", "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==")  # fmt: skip
NOTO_BLOB = Package("@iconify-json/noto-v1", "1.2.5",
    "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==")  # fmt: skip
EMOJIONE2 = Package("@iconify-json/emojione", "1.2.3",
    "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==")  # fmt: skip
EMOJIONE_MONO = Package("@iconify-json/emojione-monotone", "1.2.1",
    "cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==")  # fmt: skip
FXEMOJI = Package("@iconify-json/fxemoji", "1.2.2",
    "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==")  # fmt: skip
OPENMOJI = Package("openmoji", "17.0.0",
    "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==")  # fmt: skip
EMOJIONE1 = Package("@iconify-json/emojione-v1", "1.2.3",
    "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==")  # fmt: skip
EMOJIBASE = Package("emojibase-data", "16.0.3",
    "MopInVCDZeXvqBMPJxnvYUyKw9ImJZqIDr2sABo6acVSPev5IDYX+mf+0tsu96JJyc3INNvgIf06Eso7bdTX2Q==")  # fmt: skip
CLDR = Package("cldr-annotations-full", "48.2.0",
    "DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==")  # fmt: skip

STYLES: tuple[Style, ...] = (
    Style("noto", NOTO, "Apache-2.0", "iconify", False, "train", coded=True),
    Style("twemoji", TWEMOJI, "CC-BY-4.0", "iconify", False, "train", coded=True),
    Style("noto-blob", NOTO_BLOB, "Apache-2.0", "iconify", False, "train"),
    Style("emojione2", EMOJIONE2, "CC-BY-4.0", "iconify", False, "train"),
    Style("fluent-flat", FLUENT_FLAT, "MIT", "iconify", False, "train", coded=True),
    Style("fluent-contrast", FLUENT_CONTRAST, "MIT", "iconify", False, "train", coded=True),
    Style("fluent-3d", FLUENT_3D, "MIT", "webp-files", False, "held-out", folder="package/assets/"),
    Style("openmoji", OPENMOJI, "CC-BY-SA-4.0", "svg-files", True, "held-out", folder="package/color/svg/"),
    Style("openmoji-black", OPENMOJI, "CC-BY-SA-4.0", "svg-files", True, "held-out", folder="package/black/svg/"),
    Style("emojione-mono", EMOJIONE_MONO, "CC-BY-4.0", "iconify", False, "held-out"),
    Style("fxemoji", FXEMOJI, "Apache-2.0", "iconify", False, "held-out", squashed=True),
    Style("emojione1", EMOJIONE1, "CC-BY-SA-4.0", "iconify", True, "held-out"),
)


def packages() -> tuple[Package, ...]:
    """Every package needed, each once."""
    return tuple(dict.fromkeys([*(style.package for style in STYLES), EMOJIBASE, CLDR]))


def digest(path: Path) -> str:
    """The sha512 of a file in base64, as npm writes it."""
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def check(package: Package, path: Path) -> None:
    """Refuse a tarball whose hash is not the pinned one."""
    found = digest(path)
    if found != package.sha512:
        raise SourceError(
            f"{path.name} is not the pinned {package.name}@{package.version}: "
            f"its sha512 is {found}, expected {package.sha512}. Delete the file and fetch again."
        )


def fetch(folder: Path) -> dict[str, Path]:
    """Download what is missing into `folder`, check every hash, and give the tarball of each package name."""
    folder.mkdir(parents=True, exist_ok=True)
    tarballs = {package.name: folder / package.tarball for package in packages()}
    for package in packages():
        path = tarballs[package.name]
        if not path.exists():
            pack(package, folder)
        check(package, path)
    return tarballs


def pack(package: Package, folder: Path) -> None:
    """Run `npm pack` for one package."""
    command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SourceError("npm is needed to fetch the emoji packages, and is not on the PATH") from error
    except subprocess.CalledProcessError as error:
        raise SourceError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error
    if not (folder / package.tarball).is_file():
        raise SourceError(f"{' '.join(command)} did not write {package.tarball}")


def read(tarball: Path, member: str) -> bytes:
    """The bytes of one regular file in a tarball; nothing is written to disk."""
    with tarfile.open(tarball) as archive:
        try:
            file = archive.extractfile(member)
        except KeyError:
            file = None
        if file is None:
            raise SourceError(f"{tarball.name} holds no file {member}")
        return file.read()


def read_json(tarball: Path, member: str) -> Any:
    """One JSON member of a tarball."""
    return json.loads(read(tarball, member))


def read_folder(tarball: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """Stem and bytes of every regular file right inside `folder` (which ends in a slash)."""
    with tarfile.open(tarball) as archive:
        for member in archive:
            name = member.name.removeprefix(folder)
            if member.isfile() and member.name.startswith(folder) and "/" not in name:
                file = archive.extractfile(member)
                if file is not None:
                    yield name.rpartition(".")[0], file.read()
