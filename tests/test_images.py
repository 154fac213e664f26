"""Image files of every kind: what a viewer would show, and what it would not."""

from __future__ import annotations

import os
import pickle
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import scene, touch, write
from PIL import Image, ImageOps

from glsim.images import BadImage, find_bad, open_image
from glsim.types import DataError

# --- opening whole images ---------------------------------------------------------------------------------------------


def close(image: Image.Image, expected: Image.Image, tolerance: float = 3) -> bool:
    assert image.mode == "RGB" and image.size == expected.size
    return np.abs(np.asarray(image, float) - np.asarray(expected.convert("RGB"), float)).mean() <= tolerance


@pytest.mark.parametrize(
    "name", ["x.jpg", "x.jpeg", "x.jfif", "x.png", "x.webp", "x.bmp", "x.gif", "x.tif", "x.tiff", "x.ppm", "x.avif"]
)
def test_formats(tmp_path, name):
    scene().save(tmp_path / name)
    assert close(open_image(tmp_path / name), scene(), 12 if name.endswith("gif") else 6)
    assert close(open_image(str(tmp_path / name)), scene(), 12)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif", "x.avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, name, orientation):
    stored = scene()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif, quality=95)
    turned = stored.copy()
    turned.getexif()[0x0112] = orientation
    shown = open_image(tmp_path / name)
    assert close(shown, ImageOps.exif_transpose(turned), 6)
    assert ImageOps.exif_transpose(shown).size == shown.size  # nothing left in it that would turn it once more


def test_upright_whatever_the_rest_of_the_exif_block_holds(tmp_path):
    # The resolution as text, not as a fraction: Pillow reads this block but cannot write it, as exif_transpose would.
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 3, b"72\0\0")
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    scene().save(tmp_path / "x.jpg", exif=block)
    assert open_image(tmp_path / "x.jpg").size == (32, 48)


@pytest.mark.parametrize(
    "block", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_damaged_exif_is_no_reason_to_refuse(tmp_path, block):
    scene().save(tmp_path / "x.jpg", exif=block)
    assert open_image(tmp_path / "x.jpg").size == (48, 32)


@pytest.mark.parametrize("name", ["x.jpg", "x.tif"])
def test_cmyk(tmp_path, name):
    """Pillow writes CMYK JPEG as Adobe does: inverted, with the Adobe marker."""
    stored = scene().convert("CMYK")
    stored.save(tmp_path / name, quality=95)
    if name == "x.jpg":
        assert b"Adobe" in (tmp_path / name).read_bytes()
    assert close(open_image(tmp_path / name), stored, 4)


def tiff(pixels: np.ndarray, photometric: int) -> bytes:
    """A TIFF of (rows, columns, 3) bytes, built here: what Pillow writes of these kinds changes with its release."""
    data = zlib.compress(pixels.tobytes())
    rows, columns, _ = pixels.shape
    tags = [(256, columns), (257, rows), (258, 8), (259, 8), (262, photometric), (273, 8), (277, 3), (278, rows)]
    tags += [(279, len(data)), *[(530, 0x10001)] * (photometric == 6)]  # YCbCr that is not subsampled: 1, 1
    entries = b"".join(struct.pack("<HHII", tag, 3 if tag == 530 else 4, 1 + (tag == 530), x) for tag, x in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return start + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr", "LAB"])
def test_other_modes(tmp_path, mode):
    if mode == "LAB":  # L* of 200 / 255, no colour: grey 194 of sRGB by the CIE's formula
        (tmp_path / "x").write_bytes(tiff(np.full((8, 8, 3), (200, 0, 0), np.uint8), 8))
        stored = Image.new("RGB", (8, 8), (194, 194, 194))
    elif mode == "YCbCr":
        stored = scene().convert(mode)
        (tmp_path / "x").write_bytes(tiff(np.asarray(stored), 6))
    else:
        stored = scene().convert(mode)
        stored.save(tmp_path / "x", "PNG")
    assert close(open_image(tmp_path / "x"), stored, 3)


def test_transparency_is_shown_on_white(tmp_path):
    def corner(name: str) -> tuple[int, ...]:
        image = open_image(tmp_path / name)
        assert image.mode == "RGB"
        return image.getpixel((0, 0))

    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "rgba.png")
    assert corner("rgba.png") == (255, 127, 127)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "rgba.webp", lossless=True, exact=True)
    assert corner("rgba.webp") == (255, 255, 255)
    Image.new("LA", (4, 4), (0, 51)).save(tmp_path / "la.png")
    assert corner("la.png") == (204, 204, 204)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "rgb_key.png", transparency=(1, 2, 3))
    assert corner("rgb_key.png") == (255, 255, 255)
    Image.new("L", (4, 4), 9).save(tmp_path / "l_key.png", transparency=9)
    assert corner("l_key.png") == (255, 255, 255)

    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "p.png")
    assert corner("p.png") == (10, 200, 30)
    palette.save(tmp_path / "p_key.gif", transparency=1)
    assert corner("p_key.gif") == (255, 255, 255)
    palette.save(tmp_path / "p_table.png", transparency=bytes([255, 0]))
    assert corner("p_table.png") == (255, 255, 255)


RAMP = np.linspace(0, 1, 64).reshape(4, 16)


def stored_16_bit(name: str, path: Path) -> None:
    values = (RAMP * 65535).round()
    if name == "I;16B.tif":
        Image.frombytes("I;16B", (16, 4), values.astype(">u2").tobytes()).save(path)
    elif name == "I.pgm":
        path.write_bytes(b"P5 16 4 65535\n" + values.astype(">u2").tobytes())
    elif name == "I.tif":
        Image.fromarray(values.astype(np.int32)).save(path)
    elif name == "I32.tif":
        Image.fromarray((RAMP * (2**31 - 1)).astype(np.int32)).save(path)
    else:
        Image.fromarray(values.astype(np.uint16)).save(path)


@pytest.mark.parametrize("name", ["I;16.png", "I;16.tif", "I;16B.tif", "I.pgm", "I.tif", "I32.tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, name):
    stored_16_bit(name, tmp_path / name)
    shown = np.asarray(open_image(tmp_path / name), float)
    assert shown.shape == (4, 16, 3)
    assert np.abs(shown - RAMP[..., None] * 255).max() <= 1


@pytest.mark.parametrize(
    ("top", "name"), [(1, "x.tif"), (255, "x.tif"), (65535, "x.tif"), (1e6, "x.tif"), (1.02, "x.tif")]
)
def test_float_is_scaled(tmp_path, top, name):
    Image.fromarray((RAMP * top).astype(np.float32)).save(tmp_path / name)
    scale = 1 if top == 1.02 else top
    assert (
        np.abs(np.asarray(open_image(tmp_path / name), float)[..., 0] - (RAMP * top / scale * 255).clip(0, 255)).max()
        <= 1
    )


def test_float_with_gaps(tmp_path):
    values = RAMP.astype(np.float32).copy()
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "x.tif")
    shown = np.asarray(open_image(tmp_path / "x.tif"))
    assert shown[0, :3].max() == 0 and shown.max() == 255
    Image.fromarray(np.zeros((2, 2), np.float32) - 5).save(tmp_path / "x.tif")
    assert np.asarray(open_image(tmp_path / "x.tif")).max() == 0


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif"])
def test_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True, duration=100)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 3
    assert open_image(tmp_path / name).getpixel((0, 0)) == (255, 0, 0)


def test_camera_jpeg_with_a_preview_behind(tmp_path):
    scene().save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[scene((24, 16))])
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "MPO"
    assert close(open_image(tmp_path / "x.jpg"), scene(), 6)


# --- bad images -------------------------------------------------------------------------------------------------------


def png_header(path: Path, width: int, height: int) -> Path:
    """A PNG of 45 bytes that claims any size, its checksums right."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IEND", b"")
    )
    return path


def reason(path: Path) -> str:
    with pytest.raises(BadImage) as error:
        open_image(path)
    assert error.value.path == path and str(error.value) == f"{path}: {error.value.reason}"
    assert error.value.__cause__ is error.value.__context__ is None  # nothing keeps the decoder's memory alive
    return error.value.reason


def test_not_an_image(tmp_path):
    touch(tmp_path, "empty.jpg")
    assert reason(tmp_path / "empty.jpg") == "empty file (0 bytes)"
    write(tmp_path / "page.jpg", "<!DOCTYPE html><html>404</html>")
    assert reason(tmp_path / "page.jpg") == "not an image, or damaged at its start: b'<!DOCTYPE html><'"
    assert reason(tmp_path / "missing.jpg") == "cannot be read: No such file or directory"
    assert reason(tmp_path) == "cannot be read: Is a directory"
    write(tmp_path / "program.jpg", "%!PS-Adobe-3.0 EPSF-3.0", "%%BoundingBox: 0 0 10 10", "%%EndComments")
    assert reason(tmp_path / "program.jpg").startswith("not an image")  # EPS would start Ghostscript
    with pytest.raises(BadImage, match="null byte"):
        open_image("a\0b.jpg")


def test_no_permission(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert reason(tmp_path / "x.jpg") == "cannot be read: Permission denied"


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.bmp", "x.gif", "x.ppm"])
def test_truncated(tmp_path, name):
    scene().save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert reason(tmp_path / name).startswith("truncated: ")


@pytest.mark.parametrize("name", ["x.webp", "x.tif", "x.avif", "deflated.tif"])
def test_half_a_file_of_the_others(tmp_path, name):
    scene().save(tmp_path / name, **({"compression": "tiff_adobe_deflate"} if "deflated" in name else {}))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert reason(tmp_path / name)


def test_bomb(tmp_path):
    limit = Image.MAX_IMAGE_PIXELS
    said = reason(png_header(tmp_path / "bomb.png", 60000, 50000))
    assert said == "too large: 3000 megapixels, limit 179 megapixels (2 * PIL.Image.MAX_IMAGE_PIXELS)"
    assert limit == Image.MAX_IMAGE_PIXELS
    # Between once and twice the limit Pillow warns, which is an error here. This one has no pixels at all.
    assert reason(png_header(tmp_path / "large.png", 12000, 12000)) == "damaged: OSError: cannot load this image"


def test_a_limit_of_pixels_is_seen_before_they_are_decoded(tmp_path):
    """These files hold no pixels: had decoding begun, they would be called damaged."""
    for side in (40_000, 101):  # beyond what Pillow lets through, and below it
        content = png_header(tmp_path / "x.png", side, side).read_bytes()
        with pytest.raises(BadImage) as error:
            open_image("name.png", content, max_pixels=10_000)
        assert str(error.value) == f"name.png: too large: {side * side:,} pixels, limit 10,000"
    scene((100, 100)).save(tmp_path / "x.png")
    assert open_image("name.png", (tmp_path / "x.png").read_bytes(), max_pixels=10_000).size == (100, 100)


def test_large_photographs_open(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    scene((40, 40)).save(tmp_path / "x.jpg")
    assert open_image(tmp_path / "x.jpg").size == (40, 40)
    scene((60, 60)).save(tmp_path / "x.jpg")
    assert "too large" in reason(tmp_path / "x.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(tmp_path / "x.jpg").size == (60, 60)


def test_warning_filters_come_back_after_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    scene((40, 40)).save(tmp_path / "x.jpg")
    write(tmp_path / "bad.jpg", "no")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:  # each call alone, so that threads come and go in any order
        results = list(pool.map(lambda i: find_bad([tmp_path / ("bad.jpg" if i % 5 == 0 else "x.jpg")], 1), range(100)))
    assert [len(bad) for bad in results] == [int(i % 5 == 0) for i in range(100)]
    assert warnings.filters == before


def test_bad_image_survives_pickling():
    bad = pickle.loads(pickle.dumps(BadImage(Path("a/b.jpg"), "empty file (0 bytes)")))
    assert type(bad) is BadImage and isinstance(bad, DataError) and bad.exit_code == 3
    assert (bad.path, bad.reason, str(bad)) == (
        Path("a/b.jpg"),
        "empty file (0 bytes)",
        "a/b.jpg: empty file (0 bytes)",
    )


@pytest.mark.parametrize("workers", [None, 0, 1, 3])
def test_find_bad(tmp_path, workers):
    scene().save(tmp_path / "good.jpg")
    touch(tmp_path, "empty.jpg")
    write(tmp_path / "text.png", "text")
    paths = [tmp_path / name for name in ("text.png", "good.jpg", "empty.jpg", "good.jpg", "none.gif")]
    seen = []
    bad = find_bad(paths, workers, progress=lambda results: (seen.append(1) or result for result in results))
    assert [error.path.name for error in bad] == ["text.png", "empty.jpg", "none.gif"] and len(seen) == 5
    assert all(error.__traceback__ is None for error in bad)
    assert find_bad([]) == find_bad(paths[1:2]) == []


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.gif", "x.tif", "deflated.tif", "x.webp", "x.bmp", "x.avif"])
def test_fuzz(tmp_path, name):
    """Any damage gives an RGB image or BadImage, never another exception, warning, or open file."""
    image, dice = scene((96, 64)), random.Random(name)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "a description", 0x011A: 72.0})
    image.save(
        tmp_path / name, exif=exif, **({"compression": "tiff_adobe_deflate"} if "deflated" in name else {"quality": 90})
    )
    whole = (tmp_path / name).read_bytes()
    outcomes = {"opened": 0, "bad": 0}
    for turn in range(200):
        data = bytearray(whole)
        # half of the damage in the first 512 bytes, where the structure is
        position = dice.randrange(min(len(data), 512) if turn % 2 else len(data))
        if turn % 4 < 3:
            for offset in range(dice.choice([1, 1, 4])):
                if position + offset < len(data):
                    data[position + offset] = dice.randrange(256)
        else:
            data = data[:position]
        (tmp_path / name).write_bytes(data)
        try:
            assert open_image(tmp_path / name).mode == "RGB"
            outcomes["opened"] += 1
        except BadImage as error:
            assert error.reason
            outcomes["bad"] += 1
    assert outcomes["bad"] > 10 and outcomes["opened"] > 0, outcomes  # PNG's checksums find nearly all damage


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files the Linux way")
def test_no_file_stays_open(tmp_path):
    paths = []
    for name in ("x.jpg", "x.png", "x.tif", "x.webp", "x.gif", "x.avif"):
        scene().save(tmp_path / name)
        (tmp_path / f"half_{name}").write_bytes((tmp_path / name).read_bytes()[:200])
        paths += [tmp_path / name, tmp_path / f"half_{name}"]
    scene().save(tmp_path / "z.tif", compression="tiff_lzw")
    before = len(os.listdir("/proc/self/fd"))
    images = [open_image(path) for path in (*paths[::2], tmp_path / "z.tif")]
    assert len(find_bad(paths, workers=2)) == 6 and len(images) == 7
    assert len(os.listdir("/proc/self/fd")) == before
