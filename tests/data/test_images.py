"""Image files of every kind: what a viewer would show, and what it would not."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
import pytest
from conftest import scene, touch, write
from PIL import Image, ImageOps

from glsim import Predictor, cli
from glsim.data import limits, rgb
from glsim.data.duplicates import look_at_all
from glsim.data.images import BadImage, find_bad, open_image, read_image
from glsim.data.limits import Room, pixel_limit, sharing
from glsim.data.loaders import ImageDataset
from glsim.types import ConfigError, DataError

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


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32])
@pytest.mark.parametrize("top", [255, 65535, 2**31 - 1, 2**32 - 1])
def test_integers_are_white_at_the_top_of_their_range(tmp_path, dtype, top):
    """A 32-bit file of 0 to 255 is no black picture; negative numbers are black."""
    if top > np.iinfo(dtype).max:
        pytest.skip("no such number")
    values = (RAMP * top).astype(np.float64).round().clip(0, np.iinfo(dtype).max).astype(dtype)
    values[0, 0] = -1 if np.iinfo(dtype).min < 0 else 0
    write_tiff(tmp_path / "x.tif", values)
    shown = np.asarray(open_image(tmp_path / "x.tif"), float)[..., 0]
    assert shown[0, 0] == 0
    assert np.abs(shown - RAMP * 255).max() <= 1


def write_tiff(path: Path, values: np.ndarray) -> None:
    """A grey TIFF of any kind of number, which Pillow does not write: one strip, no compression."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    bits = 8 * values.dtype.itemsize
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags += [(279, values.nbytes), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag == 279 else 3, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + values.nbytes)
    path.write_bytes(head + values.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -5.0])
def test_without_a_visible_value_it_is_a_bad_image(tmp_path, value):
    Image.fromarray(np.full((2, 2), value, np.float32)).save(tmp_path / "x.tif")
    assert reason(tmp_path / "x.tif") == "no value can be seen: all are below 0, not a number or infinite"
    values = np.full((2, 2), value, np.float32)
    values[0, 0] = 0  # black can be seen
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert np.asarray(open_image(tmp_path / "x.tif")).max() == 0
    with pytest.raises(BadImage, match="^image 0: no value can be seen"):
        ImageDataset([Image.fromarray(np.full((2, 2), value, np.float32))], np.asarray)[0]


def test_a_dark_16_bit_picture_stays_dark(tmp_path):
    for name, stored in {"x.png": np.uint16, "x.tif": np.uint16}.items():
        Image.fromarray((RAMP * 255).astype(stored)).save(tmp_path / name)
        assert np.asarray(open_image(tmp_path / name)).max() == 1
    (tmp_path / "x.pgm").write_bytes(b"P5 16 4 65535\n" + (RAMP * 255).astype(">u2").tobytes())
    assert np.asarray(open_image(tmp_path / "x.pgm")).max() == 1


def test_pictures_of_many_bands_are_those_of_one(tmp_path, monkeypatch):
    """What is converted some rows at a time is the same to the bit."""
    image = scene((48, 32)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((48, 32)))
    kinds = {
        "rgba.png": image,
        "la.png": image.convert("LA"),
        "p.png": image.convert("P"),
        "i.tif": Image.fromarray((np.arange(1536, dtype=np.int32) * 99).reshape(32, 48)),
    }
    kinds["key.png"] = scene((48, 32)).convert("P")
    for name, stored in kinds.items():
        stored.save(tmp_path / name, **({"transparency": 3} if name == "key.png" else {}))
    whole = {name: open_image(tmp_path / name).tobytes() for name in kinds}
    monkeypatch.setattr(rgb, "BAND", 100)
    assert {name: open_image(tmp_path / name).tobytes() for name in kinds} == whole


@pytest.mark.parametrize("name", ["x.heic", "x.heif", "x.hif", "x.jpg"])
def test_heic_where_its_library_is_installed(tmp_path, monkeypatch, name):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(scene()).save(tmp_path / "x", quality=-1)
    (tmp_path / "x").rename(tmp_path / name)
    assert close(open_image(tmp_path / name), scene(), 6)
    assert find_bad([tmp_path / name]) == []
    photo = next(iter(look_at_all([tmp_path / name], 0)))
    assert (photo.format, photo.size) == ("HEIF", (48, 32))
    assert bad_within(0.002, tmp_path / name).endswith("limit 0.001 for this kind of HEIF (--max-megapixels)")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert reason(tmp_path / name)
    assert "HEIF" not in Image.OPEN  # who imports glsim has Pillow as it was


def test_heic_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    for name in ("pillow_heif", "pillow_heif.as_plugin"):
        monkeypatch.setitem(sys.modules, name, None)
    for brand in (b"heic", b"mif1"):
        (tmp_path / "x.heic").write_bytes(struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1heic" + bytes(40))
        assert reason(tmp_path / "x.heic") == "HEIC, which needs the library pillow-heif: pip install 'glsim[heif]'"
    scene().save(tmp_path / "x.avif")
    assert close(open_image(tmp_path / "x.avif"), scene(), 6)


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
    assert reason(tmp_path) == "cannot be read: a folder, not a file"
    write(tmp_path / "program.jpg", "%!PS-Adobe-3.0 EPSF-3.0", "%%BoundingBox: 0 0 10 10", "%%EndComments")
    assert reason(tmp_path / "program.jpg").startswith("not an image")  # EPS would start Ghostscript
    with pytest.raises(BadImage, match="no name of a file"):
        open_image("a\0b.jpg")


@pytest.mark.parametrize(
    ("start", "size"),
    [(b"GIF89a", 33), (b"RIFF\xff\xff\xff\x7fWEBPVP8 ", 129), (b"\0\0\0\x20ftypavif", 129), (b"II*\0", 1025)],
)
def test_a_file_far_larger_than_its_kind_is_not_read(tmp_path, start, size):
    """Sparse: it takes no room, and would take gigabytes of memory before its first pixel."""
    (tmp_path / "x.jpg").write_bytes(start)
    os.truncate(tmp_path / "x.jpg", size * 2**20)
    assert reason(tmp_path / "x.jpg") == f"{size:,} MiB, more than the {size - 1} MiB that such a file may have"


def test_no_permission(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    scene().save(tmp_path / "x.jpg")
    monkeypatch.setattr(os, "open", refuse)
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


def bad_within(megapixels: float, path: Path) -> str:
    with pixel_limit(megapixels):
        return reason(path)


def test_bomb(tmp_path):
    assert (
        reason(png_header(tmp_path / "bomb.png", 60000, 50000))
        == "too large: 3000 megapixels, limit 110 (--max-megapixels)"
    )
    assert (
        reason(png_header(tmp_path / "a.png", 10489, 10488))
        == "too large: 110.01 megapixels, limit 110 (--max-megapixels)"
    )
    # This one has no pixels at all: it passes the limit, and what cameras of 100 megapixels write passes it too.
    assert reason(png_header(tmp_path / "large.png", 11664, 8750)) == "damaged: OSError: cannot load this image"


@pytest.mark.parametrize("size", [(65_501, 1), (1, 65_501), (170_000_000, 1), (1, 50_000_000)])
def test_a_line_of_pixels_is_too_long(tmp_path, size):
    path = png_header(tmp_path / "x.png", *size)
    assert reason(path) == f"too large: {size[0]} x {size[1]} pixels, limit of a side 65,500"
    assert bad_within(1000, path).startswith("too large: ")


def test_the_longest_side_is_read(tmp_path):
    Image.new("RGB", (65_500, 1)).save(tmp_path / "x.jpg")
    assert open_image(tmp_path / "x.jpg").size == (65_500, 1)


def test_a_limit_of_pixels_is_seen_before_they_are_decoded(tmp_path):
    """These files hold no pixels: had decoding begun, they would be called damaged."""
    for side, said in ((40_000, "1600.00 megapixels"), (101, "0.0102 megapixels")):  # beyond Pillow's limit, and below
        content = png_header(tmp_path / "x.png", side, side).read_bytes()
        with pytest.raises(BadImage) as error:
            open_image("name.png", content, max_pixels=10_000)
        assert str(error.value).startswith("name.png: too large: ") and "limit 0.01 (--max-megapixels)" in str(
            error.value
        )
        assert said.split()[0].rstrip("0.") in str(error.value)
    scene((100, 100)).save(tmp_path / "x.png")
    assert open_image("name.png", (tmp_path / "x.png").read_bytes(), max_pixels=10_000).size == (100, 100)


@pytest.mark.parametrize("name", ["x.webp", "x.avif", "rle.bmp", "plain.ppm", "x.tif", "progressive.jpg"])
def test_formats_that_cost_more_have_a_lower_limit(tmp_path, name):
    """Their decoders hold every pixel several times, or take seconds for a megapixel: as many bytes, fewer pixels."""
    image = scene((60, 50))
    if name == "rle.bmp":
        rows = b"\x3c\x07\0\0" * 50
        head = struct.pack("<IiiHHIIiiII", 40, 60, 50, 1, 8, 1, len(rows), 1, 1, 256, 0)
        (tmp_path / name).write_bytes(
            b"BM" + struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078) + head + bytes(1024) + rows
        )
    elif name == "plain.ppm":
        (tmp_path / name).write_bytes(b"P3 60 50 255 " + b"7 " * 9000)
    elif name == "x.tif":
        write_tiff(tmp_path / name, np.ones((50, 60), np.uint16))
    else:
        image.save(tmp_path / name, **({"progressive": True} if "progressive" in name else {}))
    if name == "x.tif":
        with pixel_limit(0.003):
            assert open_image(tmp_path / name).size == (60, 50)
        return
    assert open_image(tmp_path / name).size == (60, 50)
    assert f"for this kind of {name[-4:].lstrip('.').upper().replace('JPG', 'JPEG')} (--max-megapixels)" in bad_within(
        0.003, tmp_path / name
    )


def test_passes_of_a_progressive_jpeg_are_counted(tmp_path):
    """A few bytes make each pass, and each goes over the whole image."""
    scene().save(tmp_path / "x.jpg", progressive=True)
    data = (tmp_path / "x.jpg").read_bytes()
    last = data[data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda")) : -2]
    (tmp_path / "x.jpg").write_bytes(data[:-2] + 20 * last + data[-2:])
    assert open_image(tmp_path / "x.jpg").size == (48, 32)
    (tmp_path / "x.jpg").write_bytes(data[:-2] + 5000 * last + data[-2:])
    assert "passes of a progressive JPEG, limit 50" in reason(tmp_path / "x.jpg")


def test_the_limit_goes_both_ways_and_leaves_pillow_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    scene((60, 60)).save(tmp_path / "x.jpg")
    assert open_image(tmp_path / "x.jpg").size == (60, 60)  # ours is the one that counts
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert bad_within(0.003, tmp_path / "x.jpg") == "too large: 0.004 megapixels, limit 0.003 (--max-megapixels)"
    with pixel_limit(400):  # more than Pillow itself lets through: none of it is there, but decoding was begun
        assert reason(png_header(tmp_path / "x.png", 20_000, 19_000)) == "damaged: OSError: cannot load this image"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(tmp_path / "x.jpg").size == (60, 60)
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="max_megapixels=.*: a number above 0"), pixel_limit(wrong):
            pass


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_that_look_at_images_keep_to_the_limit(tmp_path, workers):
    scene((60, 60)).save(tmp_path / "x.png")
    with pixel_limit(0.003):
        (found,) = look_at_all([tmp_path / "x.png"], workers)
    assert isinstance(found, BadImage) and "limit 0.003" in found.reason


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_load_images_keep_to_the_limit(tmp_path, method):
    if method not in get_all_start_methods():
        pytest.skip("not on this system")
    scene((60, 60)).save(tmp_path / "x.png")
    with pixel_limit(0.003):
        share = sharing(method)
    context = get_context(method)
    with context.Pool(1, share) as pool:
        (bad,) = pool.apply(find_bad, ([tmp_path / "x.png"],))
    assert "limit 0.003" in bad.reason
    assert find_bad([tmp_path / "x.png"]) == []


DECODING = {  # verb -> a call of it; capitals stand for places
    "bench": "--sources RUN --data SET --images 2 --batch-sizes 2 --repeats 1 --no-training --no-memory --out NEW",
    "bench loading": "--recipe synthetic_plain --data SET",
    "calibrate": "RUN --data SET --split test",
    "doctor": "SET --method plain --backbone test_vit2 --image-size 32",
    "eval": "RUN --data SET",
    "explain": "RUN SET/test --out NEW",
    "explain contrast": "RUN SET/test --classes A B --out NEW",
    "explain layers": "RUN SET/test --out NEW",
    "index add": "INDEX SET/test --label new",
    "index build": "RUN --data SET --out NEW",
    "index eval": "INDEX --data SET",
    "index query": "INDEX SET/test",
    "localize": "RUN --images SET/test --masks SET/masks/part",
    "predict": "RUN SET/test",
    "train": "--data SET --backbone test_vit2 --method plain --no-pretrained --image-size 32 --epochs 1 --out NEW",
}


@pytest.fixture(scope="module")
def places(run_folder, birds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    index = ["index", "build", str(run_folder), "--data", str(birds), "--workers", "0", "--out", str(folder / "index")]
    assert cli.main(index) == 0
    first, second = sorted(path.name for path in (birds / "test").iterdir())[:2]
    return {"RUN": run_folder, "SET": birds, "INDEX": folder / "index", "NEW": folder / "new", "A": first, "B": second}


def test_every_verb_that_decodes_is_called_below():
    verbs = {
        name: {field.name for field in dataclasses.fields(cli.load_verb(name).options)} for name in cli.verb_names()
    }
    limited = {name for name, fields in verbs.items() if "max_megapixels" in fields}
    assert limited - {"serve", "predict bulk"} == set(DECODING)  # which have tests of their own


@pytest.mark.parametrize("verb", sorted(DECODING))
def test_every_verb_that_decodes_keeps_to_its_limit(verb, places, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [re.sub(r"^[A-Z]+", lambda name: str(places[name[0]]), word) for word in DECODING[verb].split()]
    fields = {field.name for field in dataclasses.fields(cli.load_verb(verb).options)}
    words += ["--workers", "0"] if "workers" in fields else []
    code = cli.main([*verb.split(), *words, "--max-megapixels", "0.0001", "--json"])
    said = capsys.readouterr()
    assert code == (1 if verb == "bench" else 3), said  # which tells it in the row
    assert "limit 0.0001 (--max-megapixels)" in said.out


@pytest.mark.parametrize("workers", [0, 2])
def test_the_option_reaches_the_processes_that_load(run_folder, tmp_path, capsys, workers):
    for i in range(3):
        scene((60, 60 + i)).save(tmp_path / f"{i}.png")
    words = ["predict", str(run_folder), str(tmp_path), "--workers", str(workers), "--max-megapixels", "0.0036"]
    assert cli.main(words) == 3
    assert "1.png: too large: 0.0037 megapixels, limit 0.0036 (--max-megapixels)" in capsys.readouterr().err
    assert cli.main([*words, "--skip-bad", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["predictions"]) == 1 and len(told["skipped"]) == 2
    assert cli.main([*words[:-1], "nan"]) == 2
    predictor = Predictor(run_folder, workers=workers, max_megapixels=0.0036)
    assert [isinstance(a, BadImage) for a in predictor.stream(sorted(tmp_path.iterdir()))] == [False, True, True]
    with pytest.raises(ConfigError, match="max_megapixels=0"):
        Predictor(run_folder, max_megapixels=0)


# --- images in flight -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [None, get_context()])
def test_what_is_decoded_at_a_time_is_bounded(context):
    """The sum never passes the size; what is larger than all of it is alone; everybody gets a turn."""
    room, seen, together = Room(100, context), [], threading.Lock()
    now = 0

    def work(size: int) -> None:
        nonlocal now
        with room.hold(size), room.hold(size):  # the second one would wait for ever for the first
            with together:
                now += size
                seen.append((now, size))
            time.sleep(0.001)
            with together:
                now -= size

    sizes = [30, 60, 250, 99, 1, 45] * 5
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, sizes))
    assert len(seen) == 30 and room.taken.value == 0
    assert all(total <= 100 or total == size == 250 for total, size in seen)
    assert any(total > size for total, size in seen)


def test_threads_that_check_files_wait_for_room(tmp_path, monkeypatch):
    held = []

    class Watched(Room):
        @contextmanager
        def hold(self, size: int):
            with super().hold(size):
                held.append(self.taken.value)
                yield

    monkeypatch.setattr(limits, "_room", Watched(2 * 48 * 32 * 8))
    for i in range(12):
        scene().save(tmp_path / f"{i}.png")
    assert find_bad(sorted(tmp_path.glob("*.png")), 8) == []
    assert len(held) == 12 and max(held) <= 2 * 48 * 32 * 8


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak memory the Linux way")
def test_large_transparent_pictures_are_decoded_one_by_one(tmp_path):
    """Four files of 140 kB, each 288 MB as it is decoded and shown, checked by four threads."""
    packer = zlib.compressobj(1)
    data = b"".join([*(packer.compress(bytes(1 + 4 * 6000)) for _ in range(6000)), packer.flush()])
    header = struct.pack(">IIBBBBB", 6000, 6000, 8, 6, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d))
        for kind, d in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    ]
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    code = (
        "import re, sys; from pathlib import Path; from glsim.data import images, limits; "
        "limits._room = limits.Room(512 * 2**20)\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text()).group(1))\n"
        "before = peak(); bad = images.find_bad(sys.argv[1:], 4); print(len(bad), peak() - before)"
    )
    names = [str(path) for path in sorted(tmp_path.iterdir())]
    told = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True).stdout
    bad, peak = map(int, told.split())
    assert bad == 0 and 250e3 < peak < 512e3  # kB


# --- what one image raises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("x"), struct.error("x"), RuntimeError("no\nmemory")])
def test_what_happens_to_one_image_is_its_error(tmp_path, error):
    def fail(image):
        raise error

    scene().save(tmp_path / "x.jpg")
    for given in (tmp_path / "x.jpg", scene()):
        dataset = ImageDataset([given], fail, keep_bad=True)
        bad = dataset[0]
        assert isinstance(bad, BadImage) and bad.path == (given if isinstance(given, Path) else "image 0")
        wanted = (
            "too large: there is not enough memory"
            if isinstance(error, MemoryError)
            else f"cannot be prepared: 48 x 32 pixels: {type(error).__name__}"
        )
        assert bad.reason.startswith(wanted) and "\n" not in bad.reason
        with pytest.raises(BadImage):
            ImageDataset([given], fail)[0]


def test_an_error_of_ours_passes(tmp_path):
    def fail(image):
        raise ConfigError("another option")

    scene().save(tmp_path / "x.jpg")
    with pytest.raises(ConfigError, match="another option"):
        read_image(tmp_path / "x.jpg", fail)


# --- no file ----------------------------------------------------------------------------------------------------------


def make_special(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a fifo":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to({"device": "/dev/zero", "nothing": "nowhere.jpg"}[kind])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "socket", "device", "folder", "nothing", "loop"])
def test_what_is_no_regular_file_is_bad_at_once(tmp_path, monkeypatch, kind):
    path = tmp_path / "x.jpg"
    make_special(path, kind)
    said = {"folder": "a folder, not a file", "nothing": "No such file", "loop": "Too many levels"}.get(
        kind, "not a regular file"
    )
    assert reason(path).startswith(f"cannot be read: {said}")
    assert [bad.path for bad in find_bad([path])] == [path]
    (found,) = look_at_all([path], 0)
    assert isinstance(found, BadImage)
    pytest.importorskip("pyarrow")
    with pytest.raises(BadImage, match="cannot be read"):
        open_image(f"file://{path}")


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


# --- damaged files by the dozen ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_damaged_files_have_an_answer_or_are_bad_by_name(script, run_folder, tmp_path, monkeypatch):
    """The files of benchmarks/damaged_images.py, without those of gigabytes: each takes no time and stops no other."""
    damaged = script("damaged_images")
    monkeypatch.chdir(tmp_path)
    made = damaged.make(tmp_path / "data", 60, 3, damaged.photographs(None), bombs=False)
    assert set(made) == set(damaged.DAMAGE)
    damaged.make_good(tmp_path / "data", damaged.photographs(None))
    told = damaged.predictor(str(run_folder), str(tmp_path / "data"))
    one_by_one = damaged.slowest(str(run_folder), str(tmp_path / "data"))
    assert told == {name: one_by_one[name] for name in ("files", "bad")}
    assert 15 < told["bad"] < 60 and told["files"] > 100
    assert one_by_one["seconds"] < damaged.LIMIT
    bad = find_bad(damaged.files_below(str(tmp_path / "data")))
    assert len(bad) == told["bad"] and not any(b.path.name.startswith("good") for b in bad)
