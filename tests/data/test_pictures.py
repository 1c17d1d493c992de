"""Pictures: upright, on white, bounded."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qrlora.data import MAX_PIXELS, load_examples, open_picture, square
from qrlora.errors import QrloraError

ORIENTATION = 0x0112


def _png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds no pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12] = 255  # white in the upper left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "a.png").rgb), upright)


def test_transparency_is_laid_on_white_and_kept_as_mask(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (200, 0, 0, 255)
    rgba[2] = (0, 0, 0, 51)  # a fifth of black over white
    Image.fromarray(rgba).save(tmp_path / "a.png")
    picture = open_picture(tmp_path / "a.png")
    rgb = np.asarray(picture.rgb)
    assert tuple(rgb[0, 0]) == (200, 0, 0)
    assert tuple(rgb[2, 0]) == (204, 204, 204)
    assert tuple(rgb[3, 0]) == (255, 255, 255)
    assert picture.mask is not None
    np.testing.assert_array_equal(np.asarray(picture.mask)[:, 0], [255, 255, 51, 0])


def test_opaque_alpha_is_no_mask(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").mask is None


def test_palette_transparency_is_seen(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    picture = open_picture(tmp_path / "a.png")
    assert picture.rgb.getpixel((0, 0)) == (40, 50, 60)
    assert picture.rgb.getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "a.png").rgb)[..., 0], [[0, 100], [200, 255]])


def test_square_crops_the_centre_before_it_resamples() -> None:
    wide = np.zeros((10, 100_000, 3), np.uint8)
    wide[:, 49_995:50_005] = 255
    assert (np.asarray(square(Image.fromarray(wide), 64)) == 255).all()


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_corrupt_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(QrloraError, match=r"bad\.png is no readable picture"):
        open_picture(tmp_path / "bad.png")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_truncated_file_is_named(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    (tmp_path / f"cut.{kind}").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(QrloraError, match=rf"cut\.{kind} is no readable picture"):
        open_picture(tmp_path / f"cut.{kind}")


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (10_000, 10_000), (100_000, 100_000)])
def test_an_absurd_size_is_refused_from_the_header(tmp_path: Path, width: int, height: int) -> None:
    assert width * height > MAX_PIXELS
    (tmp_path / "bomb.png").write_bytes(_png_header(width, height))
    with pytest.raises(QrloraError, match=r"bomb\.png is .*above the limit of 64 million pixels"):
        open_picture(tmp_path / "bomb.png")


def test_an_absurdly_large_file_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "big.png").open("wb") as stream:
        stream.truncate(513 * 2**20)  # sparse
    with pytest.raises(QrloraError, match=r"big\.png has 513 MiB, above the limit"):
        open_picture(tmp_path / "big.png")


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(QrloraError, match="it is not one of PNG, JPEG"):
        open_picture(tmp_path / "a.png")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match=r"no picture or folder .*nowhere"):
        load_examples(tmp_path / "nowhere", "a cat", 32)
