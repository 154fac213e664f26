"""Run every verb over damaged image files: none may crash, hang, or take much memory, and each file is bad by its name.

    python benchmarks/damaged_images.py flowers12
    python benchmarks/damaged_images.py --count 200 --verbs predict,doctor        # drawn birds instead of photographs
    python benchmarks/damaged_images.py flowers12 --keep damaged                  # and leave the files there

Makes COUNT damaged files from one seed, out of images of a folder: cut off, bits turned, headers edited, sizes that are
only declared, files of some kilobytes that decode to gigabytes, sides of one pixel, every mode of Pillow, broken
metadata, several frames, no image at all, and what is no file: FIFO, socket, device, folder, links to nothing. They lie
among good images in class folders. A tiny model is trained on the good ones; then each verb runs once on those alone
and once on all. Memory is that of the process and all its children, read twenty times a second. One more process reads
the files one by one and tells the slowest. The exit code is 4 where a verb ended with another code than it should, with
a traceback, after more than LIMIT seconds a file, or with more than 1 GB beyond its run on the good images.
Times are those of the clock: run it where nothing else runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import psutil
from PIL import Image

from glsim.data import synthetic

NOT_HELD = 4
LIMIT = 10.0  # seconds for one file
EXTRA = 1e9  # bytes beyond the run on good images
PATIENCE = 1800  # seconds for a verb
CLASSES = ("daisy", "iris", "pansy")
GOOD = 8  # images a class and split
TINY = [
    "--method",
    "glsim",
    "--backbone",
    "vit_tiny_patch16_224",
    "--backbone-args.depth",
    "1",
    "--no-pretrained",
    "--image-size",
    "64",
    "--epochs",
    "1",
    "--options.top_o",
    "4",
]


# --- damage -----------------------------------------------------------------------------------------------------------

Damage = Callable[[Path, random.Random, Image.Image], None]  # writes a file of this name out of an image
ENDINGS = (".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".ppm", ".avif")


def encoded(image: Image.Image, ending: str, **options: Any) -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, {".jpg": "JPEG", ".tif": "TIFF"}.get(ending, ending[1:].upper()), **options)
    return file.getvalue()


def cut_off(path: Path, dice: random.Random, image: Image.Image) -> None:
    """The first bytes of a file."""
    data = encoded(image, path.suffix)
    path.write_bytes(data[: dice.randrange(1, len(data))])


def turned_bits(path: Path, dice: random.Random, image: Image.Image) -> None:
    """Some bits turned, anywhere."""
    data = bytearray(encoded(image, path.suffix))
    for _ in range(dice.choice((1, 3, 20))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def edited_header(path: Path, dice: random.Random, image: Image.Image) -> None:
    """Some bytes of the first 200 replaced; the checksums of a PNG put right, so that it is believed."""
    data = bytearray(encoded(image, path.suffix))
    for _ in range(dice.choice((1, 2, 6))):
        data[dice.randrange(4, min(200, len(data)))] = dice.choice((0, 1, 127, 255, dice.randrange(256)))
    if path.suffix == ".png":
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def declared(path: Path, dice: random.Random, image: Image.Image) -> None:
    """A size in the header that the data do not have."""
    width, height = dice.choice(
        ((65_535, 65_535), (13_000, 13_000), (10_000, 10_000), (30_000, 20_000), (60_000, 1_000))
    )
    data = bytearray(encoded(image, path.suffix))
    if path.suffix == ".png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif path.suffix == ".bmp":
        data[18:26] = struct.pack("<ii", width, height)
    elif path.suffix == ".gif":
        data[6:10] = struct.pack("<HH", width, height)
    elif path.suffix == ".ppm":
        data = bytearray(b"P6 %d %d 255\n" % (width, height)) + data[-3000:]
    elif path.suffix == ".jpg":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", height, width)
    elif path.suffix == ".avif":
        place = data.index(b"ispe") + 8
        data[place : place + 8] = struct.pack(">II", width, height)
    elif path.suffix == ".webp":
        chunk = struct.pack("<B3s3s3s", 0, b"", *(struct.pack("<I", side - 1)[:3] for side in (width, height)))
        data = (
            bytearray(b"RIFF" + struct.pack("<I", len(data) + 18) + b"WEBPVP8X" + struct.pack("<I", 10) + chunk)
            + data[12:]
        )
    else:
        for tag, side in ((256, width), (257, height)):
            place = data.index(
                struct.pack("<HH", tag, 4) if struct.pack("<HH", tag, 4) in data else struct.pack("<HH", tag, 3)
            )
            data[place : place + 12] = struct.pack("<HHII", tag, 4, 1, side)
    path.write_bytes(data)


def png(width: int, height: int, channels: int, bits: int = 8) -> bytes:
    """A PNG of zeros, sound in every way: a thousandth of its pixels in size."""
    row, packer = bytes(1 + width * channels * bits // 8), zlib.compressobj(9)
    data = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def rle(side: int) -> bytes:
    """A BMP of run lengths: two bytes a row."""
    rows, palette = b"\0\0" * side, bytes(1024)
    start = 54 + len(palette)
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 1, 1, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + head + palette + rows


def scans(side: int, times: int) -> bytes:
    """A progressive JPEG whose last pass comes again and again."""
    data = encoded(Image.new("RGB", (side, side)), ".jpg", progressive=True)
    last = data[data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda")) : -2]
    return data[:-2] + last * times + data[-2:]


BOMBS: dict[str, Callable[[], bytes]] = {  # made once; a file of some of these is good, as far as it is allowed
    "rgba_13000.png": lambda: png(13_000, 13_000, 4),
    "rgba_10400.png": lambda: png(10_400, 10_400, 4),
    "grey16_10400.png": lambda: png(10_400, 10_400, 1, 16),
    "line.png": lambda: png(170_000_000, 1, 1),
    "wide.png": lambda: png(65_500, 1_600, 3),
    "tall.png": lambda: png(1_600, 65_500, 3),
    "run.bmp": lambda: rle(3_700),
    "large_run.bmp": lambda: rle(10_000),
    "scans.jpg": lambda: scans(4_000, 2_000),
    "turned.jpg": lambda: encoded(Image.new("RGB", (10_400, 10_400)), ".jpg", exif=_turned()),
    "grey.gif": lambda: encoded(Image.new("L", (10_400, 10_400)), ".gif"),
    "rgba.webp": lambda: encoded(Image.new("RGBA", (7_400, 7_400)), ".webp", lossless=True, method=0),
    "large.webp": lambda: encoded(Image.new("RGB", (10_400, 10_400)), ".webp", lossless=True, method=0),
    "rgb.avif": lambda: encoded(Image.new("RGB", (7_400, 7_400)), ".avif", speed=10),
    "float.tif": lambda: encoded(Image.new("F", (10_400, 10_400)), ".tif", compression="tiff_adobe_deflate"),
    "cmyk.tif": lambda: encoded(Image.new("CMYK", (10_400, 10_400)), ".tif", compression="tiff_adobe_deflate"),
}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def absurd_sides(path: Path, dice: random.Random, image: Image.Image) -> None:
    """A line of pixels, or one."""
    size = dice.choice(
        ((1, 1), (1, 3_000), (3_000, 1), (65_500, 1), (2, 65_500), (1, 65_501), (200_000, 1), (1, 999_999))
    )
    path.write_bytes(png(*size, dice.choice((1, 2, 3, 4))))


def odd_mode(path: Path, dice: random.Random, image: Image.Image) -> None:
    """A mode that is seldom, or numbers without a colour."""
    kinds = (
        "1",
        "P",
        "LA",
        "PA",
        "CMYK",
        "LAB",
        "I",
        "I;16",
        "I;16B",
        "F",
        "nan",
        "negative",
        "infinite",
        "huge",
        "zero",
    )
    kind = dice.choice(kinds)
    values = np.asarray(image.convert("L").resize((40, 30)), np.float32)
    numbers = {"nan": np.nan, "negative": -1 - values, "infinite": np.inf, "huge": values * 1e36, "zero": 0.0}
    if kind in numbers:
        stored = Image.fromarray(np.broadcast_to(np.float32(numbers[kind]), values.shape).copy())
    elif kind == "I;16B":
        stored = Image.frombytes(kind, (40, 30), (values * 256).astype(">u2").tobytes())
    elif kind in ("I", "I;16"):
        stored = Image.fromarray((values * 100).astype({"I": np.int32, "I;16": np.uint16}[kind]))
    elif kind == "LAB":
        stored = Image.new("LAB", (40, 30), (200, 128, 128))
    else:
        stored = image.convert("RGBA").convert("P").convert("PA") if kind == "PA" else image.convert(kind)
    ending = ".png" if kind in ("1", "P", "LA") else ".tif"
    path.write_bytes(encoded(stored.convert("LA") if kind == "PA" else stored, ending))


def broken_metadata(path: Path, dice: random.Random, image: Image.Image) -> None:
    """An EXIF block or a colour profile that is none."""
    noise = dice.randbytes(dice.choice((4, 60, 5_000)))
    exif = dice.choice((b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + noise))
    ending = dice.choice((".jpg", ".png", ".webp"))
    path.write_bytes(encoded(image, ending, **dice.choice(({"exif": exif}, {"icc_profile": noise}))))


def frames(path: Path, dice: random.Random, image: Image.Image) -> None:
    """Several frames, and damage behind the first."""
    ending = dice.choice((".gif", ".png", ".webp", ".tif"))
    more = [image.rotate(90 * i) for i in range(1, 4)]
    data = bytearray(encoded(image, ending, save_all=True, append_images=more))
    for _ in range(dice.choice((0, 5, 50))):
        data[dice.randrange(len(data) // 2, len(data))] = dice.randrange(256)
    path.write_bytes(data)


def no_image(path: Path, dice: random.Random, image: Image.Image) -> None:
    """Nothing, noise, text, or the start of a format with noise behind it."""
    noise = dice.randbytes(dice.choice((1, 30, 3_000)))
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF\xff\0\0\0WEBP", b"P6 ")
    boxes = (b"\0\0\0\x1cftypavif", b"\0\0\0\x1cftypheic", b"\0\0\0\x1cftypmif1")
    texts = (b"", b"<!DOCTYPE html><html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b'{"error": 404}', bytes(9_000))
    path.write_bytes(dice.choice((*texts, noise, dice.choice((*starts, *boxes)) + noise)))


def special(path: Path, dice: random.Random, image: Image.Image) -> None:
    """What has the name of an image and is no file."""
    kind = dice.choice(("fifo", "fifo link", "socket", "zero", "random", "folder", "nothing", "loop", "closed"))
    beside = path.with_name(f".{path.stem}")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "fifo link":
        os.mkfifo(beside)
        path.symlink_to(beside.name)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))  # a path of a socket has a hundred characters at most
    elif kind in ("zero", "random"):
        path.symlink_to({"zero": "/dev/zero", "random": "/dev/random"}[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "nothing":
        path.symlink_to("nowhere.jpg")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.write_bytes(encoded(image, ".jpg"))
        path.chmod(0)


DAMAGE: dict[str, tuple[int, Damage]] = {  # and how often, of 100
    "cut off": (16, cut_off),
    "bits": (16, turned_bits),
    "header": (20, edited_header),
    "declared": (16, declared),
    "sides": (4, absurd_sides),
    "mode": (6, odd_mode),
    "metadata": (4, broken_metadata),
    "frames": (4, frames),
    "no image": (6, no_image),
    "special": (6, special),
}
BOMBED = 2  # of 100


def photographs(source: str | None) -> list[Image.Image]:
    """Images to damage, 160 pixels at most: those of a folder, or drawn birds."""
    if source is None:
        return [synthetic.draw(b, np.random.default_rng([0, i]), 96).image for i, b in enumerate(synthetic.species(24))]
    paths = sorted(Path(source).rglob("*.jpg"))
    images = [Image.open(paths[i * len(paths) // 24]).convert("RGB") for i in range(24)]
    for image in images:
        image.thumbnail((160, 160))
    return images


def make(folder: Path, count: int, seed: int, images: list[Image.Image], bombs: bool = True) -> Counter[str]:
    """Write `count` damaged files below `folder`, in train/CLASS and test/CLASS; returns how many of each kind."""
    dice, made = random.Random(seed), Counter[str]()
    names, shares = list(DAMAGE), [share for share, _ in DAMAGE.values()]
    stored = {name: make() for name, make in BOMBS.items()} if bombs else {}
    whole = count * BOMBED // 100 if bombs else 0
    for i in range(count):
        place = folder / ("train", "test")[i % 2] / CLASSES[i // 2 % len(CLASSES)]
        place.mkdir(parents=True, exist_ok=True)
        if i < whole:
            name = list(stored)[i % len(stored)]
            (place / f"{i:04d}_{name}").write_bytes(stored[name])
            made["bomb"] += 1
            continue
        kind = dice.choices(names, shares)[0] if i >= whole + len(names) else names[i - whole]
        path = place / f"{i:04d}_{kind.replace(' ', '_')}{dice.choice(ENDINGS)}"
        DAMAGE[kind][1](path, dice, dice.choice(images))
        made[kind] += 1
    return made


def make_good(folder: Path, images: list[Image.Image]) -> None:
    """Write sound images below `folder`, GOOD in each train/CLASS and test/CLASS."""
    for i in range(2 * GOOD * len(CLASSES)):
        place = folder / ("train", "test")[i % 2] / CLASSES[i // 2 % len(CLASSES)]
        place.mkdir(parents=True, exist_ok=True)
        images[i % len(images)].rotate(i // len(images)).save(place / f"good_{i:03d}.jpg", quality=95)


def make_masks(folder: Path, images: Path, dice: random.Random) -> None:
    """A mask for every file that could be an image, of the right size where there is one; some damaged."""
    Image.MAX_IMAGE_PIXELS = None  # only headers are read here
    for path in sorted(images.rglob("*.*")):
        if path.is_dir() or path.name.startswith("."):
            continue
        file = folder / path.relative_to(images).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        size = (160, 120)
        if path.is_file():
            with contextlib.suppress(Exception), Image.open(path) as opened:
                size = opened.size if max(opened.size) < 5_000 else size
        mask = Image.new("L", size)
        mask.paste(255, (0, 0, max(1, size[0] // 2), max(1, size[1] // 2)))
        mask.save(file)
        if not path.name.startswith("good") and dice.random() < 0.3:
            data = file.read_bytes()
            file.write_bytes(data[: dice.randrange(len(data))])


# --- verbs ------------------------------------------------------------------------------------------------------------


class Ran(NamedTuple):
    """One verb over one folder."""

    code: int | None  # None: it did not end
    seconds: float
    peak: int  # bytes of the process and its children
    out: str
    err: str


def watch(command: list[str], folder: Path) -> Ran:
    """Run a command; returns how it ended."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began, peak, code = time.perf_counter(), 0, None
        child = psutil.Popen(command, stdout=out, stderr=err, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while time.perf_counter() - began < PATIENCE:
            peak = max(peak, sum(map(resident, tree(child))))
            with contextlib.suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
                code = child.wait(0.05)
                break
        else:
            for process in tree(child):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            child.wait()
        out.seek(0)
        err.seek(0)
        return Ran(code, time.perf_counter() - began, peak, out.read(), err.read())


def tree(child: psutil.Popen) -> list[Any]:
    """A process and all its children."""
    with contextlib.suppress(psutil.Error):
        return [child, *child.children(recursive=True)]
    return []


def resident(process: Any) -> int:
    """Bytes in memory; 0 for a process that is gone."""
    with contextlib.suppress(psutil.Error):
        return process.memory_info().rss
    return 0


def commands(data: Path, bundle: Path, masks: Path, out: Path) -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """For each verb its command on a folder of data, and the exit codes that are right with damaged files in it."""
    glsim, this = [sys.executable, "-m", "glsim.cli"], [sys.executable, str(Path(__file__).resolve())]
    source, images, skip = str(bundle), str(data), "--skip-bad"
    found = {
        "predict": ([*glsim, "predict", source, images], (3,)),
        "predict --skip-bad": ([*glsim, "predict", source, images, skip], (0,)),
        "predict, 1 process": ([*glsim, "predict", source, images, skip, "--workers", "0", "--batch-size", "4"], (0,)),
        "eval": ([*glsim, "eval", source, "--data", images], (3,)),
        "eval --skip-bad": ([*glsim, "eval", source, "--data", images, skip, "--errors", str(out / "errors")], (0,)),
        "train": ([*glsim, "train", *TINY, "--data", images, "--out", str(out / "bad")], (3,)),
        "train --skip-bad": (
            [*glsim, "train", *TINY, skip, "--test", "--data", images, "--out", str(out / "run")],
            (0,),
        ),
        "train, cached": (
            [*glsim, "train", *TINY, skip, "--cache", "ram", "--data", images, "--out", str(out / "ram")],
            (0,),
        ),
        "calibrate": ([*glsim, "calibrate", source, "--data", images, "--split", "test"], (3,)),
        "doctor": ([*glsim, "doctor", images, "--out", str(out / "doctor.html"), "--image-size", "64"], (3,)),
        "doctor, 2 processes": (
            [*glsim, "doctor", images, "--out", str(out / "two.html"), "--image-size", "64", "--workers", "2"],
            (3,),
        ),
        "explain": ([*glsim, "explain", source, images, skip, "--out", str(out / "pictures"), "--limit", "2000"], (0,)),
        "localize": ([*glsim, "localize", source, "--images", images, "--masks", str(masks), skip], (0,)),
        "index build": (
            [*glsim, "index", "build", source, "--data", images, skip, "--out", str(out / "index")],
            (0,),
        ),
        "Predictor": ([*this, "--child", "predictor", source, images], (0,)),
        "one by one": ([*this, "--child", "slowest", source, images], (0,)),
    }
    if find_spec("ray"):
        found["predict bulk"] = (
            [*glsim, "predict", "bulk", source, images, "--out", str(out / "parts"), "--part-size", "100"],
            (0,),
        )
    if find_spec("starlette") and find_spec("uvicorn"):
        found["serve"] = ([*this, "--child", "serve", source, images], (0,))
    return found


def files_below(folder: str) -> list[Path]:
    """What the verbs find there."""
    from glsim.data.image_files import find_images

    return find_images(folder)


def predictor(source: str, folder: str) -> dict[str, Any]:
    """Answer all files by one `Predictor`; every one of them has an answer or a BadImage of its name."""
    import glsim
    from glsim.data.images import BadImage

    paths = files_below(folder)
    answers = list(glsim.Predictor(source).stream(paths))
    bad = [(path, a) for path, a in zip(paths, answers, strict=True) if isinstance(a, BadImage)]
    assert all(str(a.path) == str(path) and a.reason for path, a in bad)
    return {"files": len(paths), "bad": len(bad)}


def slowest(source: str, folder: str) -> dict[str, Any]:
    """Read and transform the files one by one; the one that took longest."""
    from glsim.checkpoints.bundle import load, preprocessing_of
    from glsim.data.images import BadImage, read_image
    from glsim.data.transforms import eval_transform

    transform, took, bad = eval_transform(preprocessing_of(load(source))), {}, 0
    for path in files_below(folder):
        began = time.perf_counter()
        try:
            read_image(path, transform)
        except BadImage:
            bad += 1
        took[path.name] = time.perf_counter() - began
    name = max(took, key=lambda name: took[name])
    return {"files": len(took), "bad": bad, "slowest": name, "seconds": round(took[name], 2)}


def serve(source: str, folder: str) -> dict[str, Any]:
    """Send all files to a server, four at a time; an answer is 200 or says what is wrong with the image."""
    from glsim.inference.server import running

    def send(path: Path) -> int:
        request = Request(
            f"{url}/predict?explain=true", path.read_bytes(), {"Content-Type": "application/octet-stream"}
        )
        try:
            return urlopen(request, timeout=60).status
        except HTTPError as error:
            return error.code

    paths = [path for path in files_below(folder) if path.is_file() and path.stat().st_size]
    with running(source, port=0, max_megapixels=110.0) as url, ThreadPoolExecutor(4) as pool:
        statuses = Counter(pool.map(send, paths))
    assert set(statuses) <= {200, 400, 413, 415}, statuses
    return {"files": len(paths), "bad": len(paths) - statuses[200], "statuses": dict(statuses)}


CHILDREN = {"predictor": predictor, "slowest": slowest, "serve": serve}


def faults(ran: Ran, clean: Ran, codes: tuple[int, ...], files: int) -> list[str]:
    """What is wrong with how a verb ended."""
    wrong = ["did not end"] if ran.code is None else []
    wrong += [f"exit {ran.code}"] if ran.code not in (None, *codes) else []
    wrong += ["traceback"] if "Traceback" in ran.err else []
    wrong += ["memory"] if ran.peak - clean.peak > EXTRA else []
    wrong += ["time"] if ran.seconds - clean.seconds > LIMIT * files else []
    wrong += [f"on good images: exit {clean.code}: {clean.err[-200:]}"] if clean.code else []
    return wrong


def run(arguments: argparse.Namespace, place: Path) -> int:
    """Make the files, run the verbs, print the table; returns the exit code."""
    images = photographs(arguments.data)
    clean, damaged = place / "clean", place / "damaged"
    for folder in (clean, damaged):
        make_good(folder, images)
    made = make(damaged, arguments.count, arguments.seed, images)
    for folder in (clean, damaged):
        make_masks(place / f"{folder.name}_masks", folder, random.Random(arguments.seed))
    print(f"{made.total()} damaged files: " + ", ".join(f"{count} {kind}" for kind, count in made.most_common()))
    bundle = place / "bundle"
    trained = watch(
        [sys.executable, "-m", "glsim.cli", "train", *TINY, "--data", str(clean), "--out", str(bundle)], place
    )
    if trained.code:
        print(trained.err, file=sys.stderr)
        return 1
    print(f"{'verb':22} {'exit':>4} {'seconds':>8} {'clean':>6} {'peak GB':>8} {'clean':>6}  verdict", flush=True)
    failed = 0
    both = [commands(d, bundle, place / f"{d.name}_masks", place / f"{d.name}_out") for d in (clean, damaged)]
    for name, (command, codes) in both[1].items():
        if arguments.verbs and name.split(",")[0].split()[0] not in arguments.verbs.split(","):
            continue
        for folder in (clean, damaged):
            (place / f"{folder.name}_out").mkdir(exist_ok=True)
        before, ran = watch(both[0][name][0], place), watch(command, place)
        wrong = faults(ran, before, codes, made.total())
        told = ran.out.strip().splitlines()[-1] if "--child" in command and ran.out.strip() else ""
        if told and (slow := json.loads(told).get("seconds", 0)) > LIMIT:
            wrong.append(f"{slow} s for one file")
        failed += bool(wrong)
        times, peaks = f"{ran.seconds:8.1f} {before.seconds:6.1f}", f"{ran.peak / 1e9:8.2f} {before.peak / 1e9:6.2f}"
        row = f"{name:22} {ran.code!s:>4} {times} {peaks}"
        print(f"{row}  {', '.join(wrong) or 'ok'} {told}", flush=True)
        if wrong:
            print(ran.err[-1500:], file=sys.stderr, flush=True)
    return NOT_HELD if failed else 0


@contextlib.contextmanager
def workplace(keep: str | None) -> Iterator[Path]:
    """A folder for all of it, removed in the end unless it is to be kept."""
    if keep is not None:
        Path(keep).mkdir(parents=True)
        yield Path(keep).resolve()
        return
    place = Path(tempfile.mkdtemp())
    try:
        yield place
    finally:
        shutil.rmtree(place)


def main() -> int:
    """Parse, then be one of the children or run all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="folder of photographs; default: drawn birds")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", help="only these, as predict,doctor")
    parser.add_argument("--keep", help="folder to make, in which all is left")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "SOURCE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, source, folder = arguments.child
        print(json.dumps(CHILDREN[what](source, folder)))
        return 0
    with workplace(arguments.keep) as place:
        return run(arguments, place)


if __name__ == "__main__":
    sys.exit(main())
