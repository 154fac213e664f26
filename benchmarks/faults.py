"""Faults that users met, reproduced one after the other through the command line; prints what each verb says today.

    python benchmarks/faults.py [--only B1 E1 ..] [--jobs 2]

Every call is a process of its own with --json. Wrong are also: anything but one JSON document on stdout, a traceback,
a call that does not end. Exit code 4 where a behaviour is not the right one. Images are drawn; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

TINY = {
    **{"method": "plain", "backbone": "vit_tiny_patch16_224", "backbone-args.depth": 1, "image-size": 64},
    **{"epochs": 1, "workers": 0, "batch-size": 8, "warmup-steps": 1},
}
SMALL = [*(f"--{key}={value}" for key, value in TINY.items()), "--no-pretrained"]
LIMIT = 240  # seconds of one call
GIB = 2**30
ENTRIES: dict[str, Callable[[Case], None]] = {}


class Said(NamedTuple):
    """What one call of a verb left."""

    code: int
    document: Any  # the JSON on stdout; None where it was none
    err: str
    seconds: float
    peak: int  # bytes, of the process

    @property
    def text(self) -> str:
        """The error, or the whole document, in one line."""
        error = self.document.get("error") if isinstance(self.document, dict) else None
        return " ".join((error or json.dumps(self.document, ensure_ascii=False) or "").split())


class Case:
    """A folder to work in, the calls made there, and what did not come out right."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.here = name, folder
        self.checks, self.wrong, self.last = 0, [], ""
        folder.mkdir()

    def check(self, holds: object, what: str) -> None:
        """Count a behaviour; remember it where it is not the right one."""
        self.checks += 1
        if not holds:
            self.wrong.append(what)

    def run(self, *words: object, env: dict[str, str] | None = None, json_too: bool = True) -> Said:
        """Call `glsim WORDS --json` in the folder."""
        command = [sys.executable, "-m", "glsim.cli", *map(str, words), *["--json"] * json_too]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})}
        out, err = self.here / ".stdout", self.here / ".stderr"
        start = time.perf_counter()
        with out.open("wb") as stdout, err.open("wb") as stderr:
            child = subprocess.Popen(
                command, cwd=self.here, env=environment, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL
            )
            late = threading.Timer(LIMIT, child.kill)
            late.start()
            _, status, usage = os.wait4(child.pid, 0)
            late.cancel()
            child.returncode = os.waitstatus_to_exitcode(status)
        seconds, text = time.perf_counter() - start, out.read_bytes().decode("utf-8", "replace")
        errors = err.read_bytes().decode("utf-8", "replace")
        shown = f"glsim {' '.join(map(str, words))[:120]}"
        document = None
        if json_too:
            try:
                document = json.loads(text, parse_constant=lambda name: 1 / 0)
            except (ValueError, ZeroDivisionError):
                self.check(False, f"{shown}: not one JSON document: {text[:200]!r} {errors[-300:]!r}")
        self.check("Traceback" not in errors, f"{shown}: traceback: {errors[-300:]!r}")
        self.check(child.returncode in (0, 1, 2, 3, 4, 130), f"{shown}: exit code {child.returncode}")
        said = Said(child.returncode, document, errors, seconds, usage.ru_maxrss * 1024)
        self.last = said.text[:300] or self.last
        return said

    def refused(self, *words: object, code: int | tuple[int, ...] = (2, 3), says: str = "", **how: Any) -> Said:
        """Call a verb that has to refuse, with a word that its sentence has to hold."""
        said = self.run(*words, **how)
        codes = code if isinstance(code, tuple) else (code,)
        shown = " ".join(map(str, words))[:120]
        self.check(said.code in codes, f"glsim {shown}: exit code {said.code}, wanted {codes}: {said.text[:200]}")
        self.check(says.lower() in said.text.lower(), f"glsim {shown}: {says!r} not in {said.text[:300]!r}")
        return said

    def fine(self, *words: object, **how: Any) -> Said:
        """Call a verb that has to work."""
        said = self.run(*words, **how)
        self.check(said.code == 0, f"glsim {' '.join(map(str, words))[:120]}: exit code {said.code}: {said.text[:300]}")
        return said

    def images(self, folder: str, count: int = 6, start: int = 0, ending: str = ".jpg") -> Path:
        """Draw images whose colour follows from the last part of the folder's name."""
        top = self.here / folder
        top.mkdir(parents=True, exist_ok=True)
        colour = hashlib.sha256(unicodedata.normalize("NFC", top.name).encode()).digest()[:3]
        for i in range(start, start + count):
            noise = np.random.default_rng([i, *folder.encode()]).integers(0, 60, (48, 48, 3))
            pixels = (np.array(list(colour)) * 0.7 + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(top / f"{i:03d}{ending}")
        return top

    def data(self, folder: str = "data", classes: str = "daisy iris pansy", train: int = 6, test: int = 4) -> Path:
        """A data set with train/ and test/."""
        for name in classes.split():
            self.images(f"{folder}/train/{name}", train)
            if test:
                self.images(f"{folder}/test/{name}", test, 100)
        return self.here / folder

    def train(self, data: object, out: str = "run", *words: object) -> Said:
        """Train the smallest network there is for one epoch."""
        return self.run("train", *SMALL, "--data", data, "--out", out, *words)

    def classes(self, out: str = "run") -> list[str] | None:
        """Class names of a bundle; None where there is none."""
        file = self.here / out / "config.json"
        return json.loads(file.read_text())["label_names"] if file.is_file() else None

    def bundle(self) -> Path:
        """A trained bundle in `run`, data in `data`."""
        self.data()
        said = self.train("data")
        assert said.code == 0, said.text
        return self.here / "run"


def entry(function: Callable[[Case], None]) -> Callable[[Case], None]:
    """Declare a reproduction; its name is that of the function."""
    ENTRIES[function.__name__.upper()] = function
    return function


# --- A ----------------------------------------------------------------------------------------------------------------


@entry
def a2(c: Case) -> None:
    """Recipes are found by name, wherever the package is installed."""
    listed = c.fine("recipes")
    c.check("cub_glsim_vit_b16" in listed.text, "glsim recipes does not list cub_glsim_vit_b16")
    c.data()
    c.fine("train", "--recipe", "flowers12_plain", *SMALL, "--data", "data", "--out", "run")
    c.refused("train", "--recipe", "flowers12_plan", "--data", "data", "--out", "x", says="flowers12_plain")


# --- B ----------------------------------------------------------------------------------------------------------------


@entry
def b1(c: Case) -> None:
    """Split folders by other names."""
    for i, (train, test) in enumerate(
        [
            *[("training", "testing"), ("training_set", "test_set"), ("train_images", "test_images")],
            *[("Train", "TEST"), ("train-set", "validation"), ("training data", "eval"), ("train", "dev")],
        ]
    ):
        for name in ("daisy", "iris", "pansy"):
            c.images(f"s{i}/{train}/{name}"), c.images(f"s{i}/{test}/{name}", 3, 50)
        said = c.train(f"s{i}", f"r{i}")
        classes = c.classes(f"r{i}")
        c.check(
            classes == ["daisy", "iris", "pansy"] or said.code in (2, 3),
            f"{train}, {test}: exit {said.code}, classes {classes}",
        )
        if said.code == 0:
            counts = json.loads((c.here / f"r{i}" / "config.json").read_text())["data"]["counts"]
            c.check(sum(counts.values()) == 27 and len(counts) == 2, f"{train}, {test}: {counts}")
    for i, names in enumerate([("my_train", "my_test"), ("train2", "test2"), ("fold_train_a", "fold_test_a")]):
        for split in names:
            for name in ("daisy", "iris"):
                c.images(f"o{i}/{split}/{name}")
        said = c.train(f"o{i}", f"q{i}")
        known = said.code == 0 and c.classes(f"q{i}") == ["daisy", "iris"]
        c.check(known or said.code in (2, 3), f"{names}: exit {said.code}, classes {c.classes(f'q{i}')}")
    c.data("only", test=0)
    c.refused("train", *SMALL, "--data", "only/train", "--out", "t", "--val-fraction", "0", "--test", code=(0, 2, 3))
    c.images("two/train/a"), c.images("two/train/b"), c.images("two/val/a", 2), c.images("two/val/b", 2)
    c.refused("train", *SMALL, "--data", "two", "--out", "u", "--test", says="test")


@entry
def b2(c: Case) -> None:
    """A class called train."""
    c.images("v/bus"), c.images("v/car"), c.images("v/train/steam"), c.images("v/train/diesel")
    c.refused("train", *SMALL, "--data", "v", "--out", "r", says="bus")
    c.images("w/bus"), c.images("w/val/x"), c.images("w/val/y"), c.images("w/tram")
    c.refused("train", *SMALL, "--data", "w", "--out", "s", says="val")


@entry
def b3(c: Case) -> None:
    """hf:FOLDER keeps every file, whatever split words its name holds."""
    for name in ("sofa", "bed", "desk"):
        c.images(f"h/{name}", 8)
    for i in range(4):
        (c.here / f"h/bed/{i:03d}.jpg").rename(c.here / f"h/bed/train_bed_{i}.jpg")
    cache = {"HF_HOME": str(c.here / "cache"), "HF_DATASETS_CACHE": str(c.here / "cache" / "datasets")}
    said = c.run("train", *SMALL, "--data", "hf:h", "--out", "r", env=cache)
    if said.code == 0:
        counts = json.loads((c.here / "r/config.json").read_text())["data"]["counts"]
        c.check(sum(counts.values()) == 24, f"hf: {counts} of 24 images")
    else:
        c.check(said.code in (2, 3), f"hf: exit {said.code}")


@entry
def b4(c: Case) -> None:
    """NFC and NFD spellings of a label are one class; no-break spaces are spaces."""
    nfc, nfd = unicodedata.normalize("NFC", "Blüte"), unicodedata.normalize("NFD", "Blüte")
    for split, name in (("train", nfc), ("test", nfd)):
        c.images(f"d/{split}/{name}"), c.images(f"d/{split}/rose")
    c.train("d", "r")
    c.check(c.classes("r") == [nfc, "rose"], f"folders: {c.classes('r')}")
    rows = [["path", "label"]]
    rows += [[f"d/train/{nfc}/{i:03d}.jpg", (nfc, nfd)[i % 2]] for i in range(6)]
    rows += [[f"d/train/rose/{i:03d}.jpg", ("red rose", "red\u00a0rose")[i % 2]] for i in range(6)]
    with (c.here / "list.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    c.train("list.csv", "l")
    c.check(c.classes("l") == [nfc, "red rose"], f"lists: {c.classes('l')}")
    c.fine("index", "build", "r", "--data", "d", "--out", "ix", "--split", "train", "--workers", 0)
    added = c.images("more/x", 2)
    c.fine("index", "add", "ix", added, "--label", nfd, "--workers", 0)
    classes = json.loads((c.here / "ix/index.json").read_text())["classes"]
    c.check(classes == [nfc, "rose"], f"index add: {classes}")


@entry
def b5(c: Case) -> None:
    """Junk of file servers is no image; what is left out is counted by its ending."""
    for name in ("daisy", "iris"):
        c.images(f"d/train/{name}"), c.images(f"d/test/{name}", 2, 50)
        for junk in ("@eaDir", "__MACOSX", "$RECYCLE.BIN", ".thumbnails", "#recycle", "@__thumb"):
            c.images(f"d/train/{name}/{junk}", 2)
        (c.here / f"d/train/{name}/Thumbs.db").write_bytes(b"x")
        (c.here / f"d/train/{name}/._000.jpg").write_bytes(b"x")
        (c.here / f"d/train/{name}/noending").write_bytes(b"x")
        (c.here / f"d/train/{name}/notes.txt").write_bytes(b"x")
    said = c.train("d", "r")
    counts = json.loads((c.here / "r/config.json").read_text())["data"]["counts"] if said.code == 0 else {}
    c.check(counts.get("train") == 12, f"junk: {counts}")
    c.check(".txt" in said.err + said.text, f"left out: {said.err[-300:]}")
    c.images("e/train/a", 3, ending=".jpeg"), c.images("e/train/b", 3), c.images("e/test/a", 1), c.images("e/test/b", 1)
    for path in list((c.here / "e/train/a").iterdir()):
        path.rename(path.with_suffix(".jpe"))
    said = c.train("e", "q")
    counts = json.loads((c.here / "q/config.json").read_text())["data"]["counts"] if said.code == 0 else {}
    c.check(counts.get("train") == 6, f".jpe: {counts} {said.text[:200]}")
    import tarfile

    (c.here / "shards").mkdir()
    for split in ("train", "test"):
        with tarfile.open(c.here / f"shards/{split}-0.tar", "w") as tar:
            for name in ("daisy", "iris"):
                for i, path in enumerate(sorted((c.here / f"d/train/{name}").glob("0*.jpg"))):
                    tar.add(path, f"{name}{i}{split}.v2.jpg")
                    info = tarfile.TarInfo(f"{name}{i}{split}.cls")
                    info.size = len(name)
                    tar.addfile(info, io.BytesIO(name.encode()))
    said = c.train("wds:shards", "w")
    counts = json.loads((c.here / "w/config.json").read_text())["data"]["counts"] if said.code == 0 else {}
    c.check(counts.get("train") == 12 or said.code in (2, 3), f"shards: {counts} {said.text[:200]}")


@entry
def b6(c: Case) -> None:
    """What glsim writes inside a flat data folder becomes no class."""
    for name in ("daisy", "iris", "pansy"):
        c.images(f"flat/{name}", 8)
    first = c.train("flat", "flat/run")
    again = first
    if first.code == 0:
        image = next((c.here / "flat/daisy").iterdir())
        for words in (
            ("eval", "flat/run", "--data", "flat", "--out", "flat/results", "--errors", "flat/mistakes"),
            ("explain", "flat/run", image, "--out", "flat/pictures"),
            ("index", "build", "flat/run", "--data", "flat", "--out", "flat/index", "--workers", 0),
        ):
            c.run(*words)
        again = c.train("flat", "again")
        c.check(c.classes("again") == ["daisy", "iris", "pansy"], f"{c.classes('again')} {again.text[:200]}")
    c.check(first.code in (0, 2, 3) and again.code in (0, 2, 3), f"{first.code} {again.code}")


@entry
def b7(c: Case) -> None:
    """Pictures of unusual numbers are shown as a viewer shows them, or refused."""
    from glsim.data.images import BadImage, open_image

    ramp = np.tile(np.arange(256, dtype=np.int32), (16, 1))
    Image.fromarray(ramp, "I").save(c.here / "i.tif")
    shown = np.asarray(open_image(c.here / "i.tif"))[..., 0]
    c.check(shown.max() > 200 and np.abs(shown.astype(int) - ramp).max() <= 2, f"32 bit of 0..255: up to {shown.max()}")
    for name, value in {"nan": np.nan, "inf": np.inf, "minus": -5.0, "minf": -np.inf}.items():
        file = c.here / f"{name}.tif"
        Image.fromarray(np.full((16, 16), value, np.float32), "F").save(file)
        try:
            open_image(file)
            c.check(False, f"a picture of {value} is answered")
        except BadImage as error:
            c.last = str(error)
            c.check(True, "")


@entry
def b8(c: Case) -> None:
    """Text options are text."""
    c.bundle()
    c.fine("index", "build", "run", "--data", "data", "--out", "ix", "--split", "train", "--workers", 0)
    for i, label in enumerate(("null", "007", "1e3", "true", "[a]", "{a: 1}", "~", "yes")):
        c.fine("index", "add", "ix", c.images(f"more/f{i}", 1), "--label", label, "--workers", 0)
        classes = json.loads((c.here / "ix/index.json").read_text())["classes"]
        c.check(label in classes, f"--label {label}: {classes}")


@entry
def b9(c: Case) -> None:
    """~ is the home folder in every path."""
    home = c.here / "home"
    home.mkdir()
    c.data()
    c.run("train", *SMALL, "--data", "data", "--out=~/run", env={"HOME": str(home)})
    c.check((home / "run/config.json").is_file() and not (c.here / "~").exists(), "--out=~/run")
    (c.here / "r.yaml").write_text("out: ~/run2\ndata: data\n")
    c.run("train", *SMALL, "--recipe", "r.yaml", env={"HOME": str(home)})
    c.check((home / "run2/config.json").is_file() and not (c.here / "~").exists(), "out: ~/run2 in a recipe")
    c.fine("eval", "~/run", "--data", "data", "--out=~/evaluation", "--workers", 0, env={"HOME": str(home)})
    c.check((home / "evaluation").is_dir() and not (c.here / "~").exists(), "eval --out=~/evaluation")


@entry
def b10(c: Case) -> None:
    """One image under several spellings of its path is one image; lists are read alike everywhere."""
    c.data()
    rows = [["path", "label", "split"]]
    rows += [[f"data/train/{name}/{i:03d}.jpg", name, "train"] for name in ("daisy", "iris") for i in range(6)]
    for other in (
        str(c.here / "data/train/daisy/000.jpg"),
        "data/test/../train/daisy/000.jpg",
        "./data//train/daisy/000.jpg",
    ):
        with (c.here / "list.csv").open("w", newline="") as file:
            csv.writer(file).writerows([*rows, [other, "daisy", "test"]])
        c.refused("train", *SMALL, "--data", "list.csv", "--out", "x", says="one class and one split")
    (c.here / "semicolon.csv").write_text(
        "Path;Label\n" + "".join(f"data/train/{n}/{i:03d}.jpg;{n}\n" for n in ("daisy", "iris") for i in range(6))
    )
    c.check(c.train("semicolon.csv", "r").code == 0, "train from a list with ; and Path")
    said = c.fine("predict", "bulk", "r", "semicolon.csv", "--out", "bulk", "--workers", 1)
    c.check(said.code == 0 and said.document["images"] == 12, f"ray from the same list: {said.text[:200]}")
    (c.here / "taxonomy.csv").write_text("Label;Family\ndaisy;asters\niris;irids\n")
    c.fine("eval", "r", "--data", "semicolon.csv", "--split", "all", "--taxonomy", "taxonomy.csv", "--workers", 0)


@entry
def b11(c: Case) -> None:
    """Messages that point at what would work."""
    c.data("zip/flowers")
    c.refused("train", *SMALL, "--data", "zip", "--out", "r", says="flowers")
    c.bundle()
    shutil.move(c.here / "run", c.here / "moved")
    c.refused("train", "--recipe", "moved/train.yaml", "--resume", says="--out")
    image = next((c.here / "data/test/iris").iterdir())
    c.refused("predict", "moved", "s3://bucket/x", says="predict bulk")
    (c.here / "list.csv").write_text(f"path\n{image}\n")
    c.refused("predict", "moved", "list.csv", says="predict bulk")
    (c.here / "file").write_text("")
    for words in (
        ("doctor", "data", "--out", "file/x.html", "--image-size", 64),
        ("predict", "moved", image, "--out", "file/x.csv"),
        ("explain", "moved", image, "--out", "file/x"),
        ("export", "moved", "--out", "file/x.onnx"),
    ):
        said = c.refused(*words, code=(1, 2, 3), says="file")
        c.check(said.seconds < 30, f"{words}: known after {said.seconds:.0f} s")


# --- C ----------------------------------------------------------------------------------------------------------------


@entry
def c1(c: Case) -> None:
    """An empty validation split."""
    c.data(train=1, test=2)
    c.refused("train", *SMALL, "--data", "data", "--out", "r", "--val-fraction", "0.2", says="val")
    c.check(not (c.here / "r/config.json").exists(), "it trained first")
    c.fine("train", *SMALL, "--data", "data", "--out", "s")
    for words in (
        ("eval", "s", "--data", "data", "--split", "val"),
        ("calibrate", "s", "--data", "data"),
        ("index", "build", "s", "--data", "data", "--split", "val", "--out", "ix"),
    ):
        c.refused(*words, says="val")
    (c.here / "r.yaml").write_text("".join(f"{k.replace('-', '_')}: {v}\n" for k, v in TINY.items() if "." not in k))
    c.refused(
        *(
            "reproduce",
            "r.yaml",
            "--data",
            "data",
            "--out",
            "rep",
            "--lrs",
            "0.1",
            "0.01",
            "--train.pretrained",
            "false",
        ),
        *("--train.backbone_args", '{"depth": 1}'),
        says="val",
    )


@entry
def c2(c: Case) -> None:
    """What is no GlsimError by birth."""
    c.data()
    net = ["--method=plain", "--no-pretrained", "--epochs=1", "--workers=0", "--data=data"]
    c.refused(
        *("train", *net, "--backbone=resnet18", "--image-size=32", "--batch-size=1", "--out=a"),
        code=(1, 2, 3),
        says="batch",
    )
    c.refused(
        "train",
        *SMALL,
        "--data=data",
        "--out=b",
        "--compile",
        code=(0, 1, 2),
        env={"CXX": "/none", "CC": "/none", "PATH": "/none"},
    )
    shown = subprocess.run(
        f"{sys.executable} -m glsim.cli --help | true", shell=True, capture_output=True, text=True, cwd=c.here
    )
    c.check("Traceback" not in shown.stderr and "Broken" not in shown.stderr, f"--help | true: {shown.stderr[-200:]}")


@entry
def c3(c: Case) -> None:
    """Output in another encoding than UTF-8."""
    for name in ("菖蒲", "Löwenzahn"):
        c.images(f"d/train/{name}"), c.images(f"d/test/{name}", 1, 50)
    c.train("d", "r")
    image = next((c.here / "d/test/菖蒲").iterdir())
    for encoding in ("cp1252", "ascii", "latin-1", "utf-16"):
        for words in (["predict", "r", str(image)], ["predict", "r", str(image), "--json"], ["--help"]):
            done = subprocess.run(
                [sys.executable, "-m", "glsim.cli", *words],
                cwd=c.here,
                capture_output=True,
                env={**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"},
            )
            c.check(done.returncode == 0 and done.stdout, f"{encoding}: {words} {done.returncode} {done.stderr[-200:]}")
            c.check(b"Traceback" not in done.stderr, f"{encoding}: {done.stderr[-200:]}")
            if words[-1] == "--json" and encoding != "utf-16":
                labels = json.dumps(json.loads(done.stdout.decode(encoding)), ensure_ascii=False)
                c.check("菖蒲" in labels, f"{encoding}: {labels[:200]}")


@entry
def c4(c: Case) -> None:
    """Bundles, indexes and jobs that hold anything."""
    run = c.bundle()
    config = json.loads((run / "config.json").read_text())
    image = next((c.here / "data/test/iris").iterdir())

    def damaged(name: str, change: Callable[[dict[str, Any]], object]) -> Path:
        folder = c.here / name
        shutil.copytree(run, folder)
        changed = json.loads(json.dumps(config))
        change(changed)
        (folder / "config.json").write_text(json.dumps(changed))
        return folder

    nested: Any = 1
    for _ in range(970):
        nested = {"a": nested}
    c.refused("predict", damaged("deep", lambda x: x["backbone_args"].update(a=nested)), image)
    c.refused("predict", damaged("nan", lambda x: x["options"].update(dropout=float("nan"))), image)
    for name, change in {
        "counts": lambda x: x.update(data={"counts": 1}),
        "epochs": lambda x: x.update(training={"epochs": 1}),
        "licence": lambda x: x.update(licence={"model": [1]}),
        "size": lambda x: x["preprocessing"].update(image_size="x"),
        "calibration": lambda x: x.update(calibration={"temperature": True, "threshold": "x"}),
        "labels": lambda x: x.update(label_names=[1, 2, 3]),
    }.items():
        said = c.run("calibrate", damaged(name, change), "--data", "data", "--split", "all", "--workers", 0)
        c.check(said.code in (0, 2, 3), f"calibrate, {name}: {said.code} {said.text[:200]}")
    shutil.copytree(run, c.here / "metrics")
    for text in ("", "[]", '{"test": 1}', '{"test": {"top1": "x"}}', "{" * 5000):
        (c.here / "metrics/metrics.json").write_text(text)
        said = c.run("calibrate", "metrics", "--data", "data", "--split", "all", "--workers", 0)
        c.check(said.code in (0, 2, 3), f"metrics.json {text[:20]}: {said.code} {said.text[:200]}")
    c.fine("index", "build", "run", "--data", "data", "--out", "ix", "--split", "train", "--workers", 0)
    table = json.loads((c.here / "ix/index.json").read_text())
    import safetensors.numpy

    vectors = safetensors.numpy.load_file(c.here / "ix" / table["vectors"])["vectors"]
    data = safetensors.numpy.save({"vectors": np.ascontiguousarray(vectors[:, :-5])})
    table["vectors"] = f"vectors-{hashlib.sha256(data).hexdigest()}.safetensors"
    (c.here / "ix" / table["vectors"]).write_bytes(data)
    (c.here / "ix/index.json").write_text(json.dumps(table))
    c.refused("index", "query", "ix", image, "--workers", 0)
    (c.here / "job").mkdir()
    for text in ("[]", "1", "{", '{"format": []}'):
        (c.here / "job/job.json").write_text(text)
        c.refused("predict", "bulk", "run", image, "--workers", 1, "--out", "job")


# --- D ----------------------------------------------------------------------------------------------------------------


@entry
def d1(c: Case) -> None:
    """A likelihood without a maximum calibrates nothing."""
    c.bundle()
    one = c.here / "one/test/iris"
    one.mkdir(parents=True)
    said = c.run("predict", "run", *sorted((c.here / "data/train").rglob("*.jpg")), "--workers", 0)
    right: list[tuple[Path, str]] = []
    for answer in said.document["predictions"] if said.document and "predictions" in said.document else []:
        right.append((Path(answer["path"]), answer["answers"][0]["label"]))
    c.check(right, f"predict --json: {said.text[:200]}")
    with (c.here / "right.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *right])
    if right:
        said = c.run("calibrate", "run", "--data", "right.csv", "--split", "all", "--workers", 0)
        temperature = (said.document or {}).get("temperature", 1.0) if said.code == 0 else 1.0
        c.check(said.code in (2, 3) or temperature == 1.0, f"all right: {said.code}, temperature {temperature}")
        with (c.here / "single.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path", "label"], right[0]])
        said = c.run("calibrate", "run", "--data", "single.csv", "--split", "all", "--workers", 0)
        temperature = (said.document or {}).get("temperature", 1.0) if said.code == 0 else 1.0
        c.check(said.code in (2, 3) or temperature == 1.0, f"one image: {said.code}, temperature {temperature}")


@entry
def d2(c: Case) -> None:
    """Unreadable images are not answered."""
    c.bundle()
    (c.here / "data/test/iris/bad.jpg").write_bytes(b"no image")
    said = c.fine("predict", "bulk", "run", "data/test/iris", "--out", "bulk", "--workers", 1)
    c.check(
        said.document and (said.document["answered"], said.document["errors"], said.document["images"]) == (4, 1, 5),
        f"{said.text[:200]}",
    )


@entry
def d3(c: Case) -> None:
    """The card tells the batch that was used."""
    c.data()
    c.train("data", "run", "--batch-size", 64)
    card = (c.here / "run/README.md").read_text() if (c.here / "run/README.md").exists() else ""
    c.check("18 images a step" in card and "64 images a step" not in card, f"{card[-600:]}")


@entry
def d4(c: Case) -> None:
    """A graph is held to its config."""
    import onnx

    c.bundle()
    c.fine("export", "run", "--out", "model.onnx")
    image = next((c.here / "data/test/iris").iterdir())

    def changed(name: str, change: Callable[[dict[str, Any], Any], object]) -> str:
        model = onnx.load(c.here / "model.onnx")
        values = {p.key: json.loads(p.value) for p in model.metadata_props}
        change(values, model)
        for p in model.metadata_props:
            p.value = json.dumps(values[p.key])
        onnx.save(model, c.here / name)
        return name

    def classes(count: int) -> Callable[[dict[str, Any], Any], object]:
        return lambda values, _: values.update(num_classes=count, label_names=None)

    for count in (2, 7, 10**9, 0, -1):
        said = c.refused("predict", changed(f"n{count}.onnx", classes(count)), image, "--workers", 0)
        c.check(said.peak < 3 * GIB, f"{count} classes: {said.peak / GIB:.1f} GiB")
    c.refused(
        "predict",
        changed(
            "size.onnx",
            lambda values, _: (values.update(image_size=[96, 96]), values["preprocessing"].update(image_size=[96, 96])),
        ),
        image,
        "--workers",
        0,
    )

    def scalar(values: dict[str, Any], model: Any) -> None:
        name = model.graph.output[0].name
        model.graph.node.append(onnx.helper.make_node("ReduceSum", [name], ["total"], keepdims=0))
        model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, []))

    c.refused("predict", changed("rank.onnx", scalar), image, "--workers", 0)


@entry
def d5(c: Case) -> None:
    """The size in the preprocessing is the model's."""
    run = c.bundle()
    config = json.loads((run / "config.json").read_text())
    image = next((c.here / "data/test/iris").iterdir())
    for size in ([96, 96], [64, 80], [4096, 4096]):
        config["preprocessing"]["image_size"] = size
        (run / "config.json").write_text(json.dumps(config))
        said = c.refused("predict", "run", image, "--workers", 0)
        c.check(said.seconds < 30, f"{size}: {said.seconds:.0f} s")


@entry
def d6(c: Case) -> None:
    """Numbers that are none are refused."""
    import torch
    from safetensors.torch import load_file, save_file

    run = c.bundle()
    image = next((c.here / "data/test/iris").iterdir())
    from glsim.checkpoints.bundle import digest

    weights = load_file(run / "model.safetensors")
    for value in (float("nan"), float("inf"), float("-inf")):
        for name in (sorted(weights)[0], sorted(weights)[-1]):
            bad = {k: v.clone() for k, v in weights.items()}
            bad[name].view(-1)[0] = value
            save_file(bad, run / "model.safetensors", metadata={"format": "pt", "sha256": digest(bad)})
            c.refused("predict", "run", image, "--workers", 0)
    huge = {k: v.clone() for k, v in weights.items()}
    for name, value in huge.items():
        if value.ndim == 2 and torch.is_floating_point(value):
            huge[name] = value * 1e30
    save_file(huge, run / "model.safetensors", metadata={"format": "pt", "sha256": digest(huge)})
    said = c.run("predict", "run", image, "--workers", 0)
    c.check(said.code in (1, 2, 3) or "NaN" not in said.text, f"overflow: {said.code} {said.text[:200]}")


# --- E ----------------------------------------------------------------------------------------------------------------


class Touch:
    """What a pickle may run."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@entry
def e1(c: Case) -> None:
    """No file of a run is unpickled."""
    import torch

    c.data()
    c.train("data", "run", "--ema", "0.9", "--epochs", "2", "--save-steps", "1")
    evil, folder = c.here / "pwned", c.here / "run/checkpoint"
    names = {path.name for path in folder.rglob("*") if path.is_file()} | {
        *("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "scaler.pt"),
        *("pytorch_model.bin", "sampler.bin", "model.safetensors", "state.json", "ema.pt"),
    }
    shutil.copytree(c.here / "run", c.here / "kept")
    for name in sorted(names):
        shutil.rmtree(c.here / "run")
        shutil.copytree(c.here / "kept", c.here / "run")
        with (folder / name).open("wb") as file:  # torch takes no path that begins with a dot
            torch.save({"a": Touch(evil)}, file)
        said = c.run("train", "--recipe", "run/train.yaml", "--resume")
        c.check(not evil.exists(), f"{name}: code ran")
        c.check(said.code in (0, 1, 2, 3), f"{name}: {said.code}")
        evil.unlink(missing_ok=True)


@entry
def e2(c: Case) -> None:
    """An edited recipe is not the run's."""
    c.data()
    c.train("data", "run", "--epochs", "2")
    file = c.here / "run/train.yaml"
    before = file.read_text()
    import yaml

    for key, value in {
        "lr": 0.5,
        "batch_size": 4,
        "epochs": 5,
        "seed": 7,
        "label_smoothing": 0.3,
        "augment": "weak",
    }.items():
        settings = yaml.safe_load(before)
        if settings.get(key) == value:
            continue
        settings[key] = value
        file.write_text(yaml.safe_dump(settings))
        c.refused("train", "--recipe", "run/train.yaml", "--resume", says=key)
    file.write_text(before)


@entry
def e3(c: Case) -> None:
    """A replaced training image is seen, or the documentation says that it is not."""
    c.data()
    c.train("data", "run", "--epochs", "2")
    shutil.copy(c.here / "data/train/iris/000.jpg", c.here / "data/train/daisy/000.jpg")
    said = c.run("train", "--recipe", "run/train.yaml", "--resume")
    docs = (Path(__file__).parent.parent / "docs/training.md").read_text().lower()
    c.check(said.code in (2, 3) or "content" in docs, f"{said.code}: {said.text[:200]}")


@entry
def e4(c: Case) -> None:
    """Parts of a job are held to their content."""
    c.bundle()
    words = ("predict", "bulk", "run", "data/train", "--out", "bulk", "--workers", 1, "--part-size", 6)
    first = c.fine(*words)
    import pyarrow.parquet as pq

    parts = sorted((c.here / "bulk").glob("part-*.parquet"))
    c.check(len(parts) == 3, f"{len(parts)} parts, {first.text[:200]}")
    if len(parts) < 3:
        return
    parts[0].write_bytes(b"garbage")
    parts[1].write_bytes(b"")
    parts[2].unlink()
    parts[2].mkdir()
    said = c.run(*words)
    rows = sum(pq.read_metadata(path).num_rows for path in parts if path.is_file()) if said.code == 0 else 18
    c.check(rows == 18, f"{rows} rows of 18 after exit {said.code}")


@entry
def e5(c: Case) -> None:
    """A killed job leaves nothing in the way."""
    c.bundle()
    (c.here / "bulk/.part-x").mkdir(parents=True)
    words = ("predict", "bulk", "run", "data/train", "--out", "bulk", "--workers", 1, "--part-size", 6)
    c.fine(*words)
    command = [sys.executable, "-m", "glsim.cli", *map(str, words[:5]), "bulk2", *map(str, words[6:])]
    for number in (signal.SIGTERM, signal.SIGKILL):
        before = ray_processes()
        child = subprocess.Popen(command, cwd=c.here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 90
        while not ray_processes() - before and time.time() < deadline and child.poll() is None:
            time.sleep(0.5)
        time.sleep(4)
        child.send_signal(number)
        child.wait()
        deadline = time.time() + 60
        while ray_processes() - before and time.time() < deadline:
            time.sleep(1)
        left = ray_processes() - before
        c.check(not left, f"signal {number}: {len(left)} processes of Ray are left after a minute")


def ray_processes() -> set[int]:
    """Processes of any Ray cluster on this machine."""
    import psutil

    found = set()
    for process in psutil.process_iter(["pid", "cmdline", "name"]):
        line = " ".join(process.info["cmdline"] or []) + str(process.info["name"])
        if (
            "ray" in line and any(w in line for w in ("raylet", "gcs_server", "agent", "ray::"))
        ) and "faults.py" not in line:
            found.add(process.info["pid"])
    return found


# --- F ----------------------------------------------------------------------------------------------------------------


def bomb(path: Path, width: int, height: int, mode: str = "RGBA") -> Path:
    """A small PNG of many pixels, all zero."""
    kind, channels = {"L": (0, 1), "RGB": (2, 3), "RGBA": (6, 4)}[mode]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, row = zlib.compressobj(9), bytes(1 + width * channels)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


@entry
def f1(c: Case) -> None:
    """Pixels in flight are bounded."""
    c.bundle()
    clean = c.run("train", *SMALL, "--data", "data", "--out", "clean", "--skip-bad").peak
    first = bomb(c.here / "data/train/iris/a.png", 13000, 13000)
    for name in "bcd":
        shutil.copy(first, first.with_name(f"{name}.png"))
    said = c.run("train", *SMALL, "--data", "data", "--out", "r", "--skip-bad", "--batch-size", 4)
    c.check(said.peak - clean < GIB, f"{(said.peak - clean) / GIB:.2f} GiB beyond the clean run")
    c.check(said.code in (0, 3), f"{said.code} {said.text[:200]}")
    skipped = len((said.document or {}).get("skipped", []))
    c.last = f"{(said.peak - clean) / GIB:.2f} GiB beyond a clean run; {skipped} skipped"


@entry
def f2(c: Case) -> None:
    """Nothing but a regular file is opened."""
    run = c.bundle()
    image = next((c.here / "data/test/iris").iterdir())
    for number, make in enumerate((os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero"), a_socket)):
        folder = c.images(f"p{number}", 2)
        make(str(folder / "x.jpg"))
        said = c.run("predict", "run", folder, "--workers", 0)
        c.check(said.seconds < 60 and said.code in (0, 3), f"predict {number}: {said.code} after {said.seconds:.0f} s")
        shutil.copytree(c.here / "data", c.here / f"data{number}", dirs_exist_ok=True)
        make(str(c.here / f"data{number}/train/iris/x.jpg"))
        for words in (
            ("train", *SMALL, "--data", f"data{number}", "--out", f"t{number}"),
            ("train", *SMALL, "--data", f"data{number}", "--out", f"u{number}", "--skip-bad"),
            ("doctor", f"data{number}", "--workers", 0, "--out", f"d{number}.html", "--image-size", 64),
        ):
            said = c.run(*words)
            c.check(said.seconds < 100, f"{words[0]} {number}: {said.seconds:.0f} s")
    c.fine("index", "build", "run", "--data", "data", "--out", "ix", "--split", "train", "--workers", 0)
    for name in ("model.safetensors", "config.json", "metrics.json", "README.md"):
        shutil.copytree(run, c.here / "fifo", dirs_exist_ok=True)
        (c.here / "fifo" / name).unlink()
        os.mkfifo(c.here / "fifo" / name)
        for words in (
            ("predict", "fifo", image, "--workers", 0),
            ("calibrate", "fifo", "--data", "data", "--split", "all"),
        ):
            said = c.run(*words)
            c.check(said.seconds < 60, f"{words[0]}, {name} is a FIFO: {said.seconds:.0f} s")
        shutil.rmtree(c.here / "fifo")
    (c.here / "ix/index.json").unlink()
    os.mkfifo(c.here / "ix/index.json")
    c.refused("index", "query", "ix", image, "--workers", 0)
    os.mkfifo(c.here / "list.csv")
    c.refused("train", *SMALL, "--data", "list.csv", "--out", "l")
    os.mkfifo(c.here / "recipe.yaml")
    c.refused("train", "--recipe", "recipe.yaml", "--data", "data", "--out", "m")
    os.mkfifo(c.here / "model.pth"), os.mkfifo(c.here / "model.onnx")
    c.refused("predict", "model.pth", image), c.refused("predict", "model.onnx", image)


def a_socket(path: str) -> None:
    """Bind a socket file that stays when the socket is closed."""
    here = Path.cwd()
    os.chdir(Path(path).parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(Path(path).name)
    finally:
        os.chdir(here)


@entry
def f3(c: Case) -> None:
    """A very long image is a bad image."""
    c.bundle()
    folder = c.images("p", 2)
    bomb(folder / "long.png", 170_000_000, 1, "L")
    bomb(folder / "tall.png", 1, 2_000_000, "L")
    clean = c.run("predict", "run", c.images("q", 2), "--workers", 0).peak
    for verb, words in (("predict", ("--skip-bad",)), ("predict", ()), ("predict bulk", ("--out", "bulk"))):
        bulk = verb == "predict bulk"
        said = c.run(*verb.split(), "run", folder, "--workers", 1 if bulk else 0, *words)
        c.check(said.code == (0 if words else 3), f"{verb} {words}: {said.code} {said.text[:200]}")
        c.check(said.seconds < 100, f"{verb} {words}: {said.seconds:.0f} s")
        c.check(bulk or said.peak - clean < GIB, f"{words}: {(said.peak - clean) / GIB:.2f} GiB more")


class Server:
    """A served bundle on a free port."""

    def __init__(self, c: Case, *words: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "glsim.cli", "serve", "run", "--port", str(self.port), *map(str, words)]
        self.log = (c.here / "serve.log").open("wb")
        self.child = subprocess.Popen(command, cwd=c.here, stdout=self.log, stderr=self.log)
        for _ in range(240):
            if self.get("/health")[0] == 200:
                return
            time.sleep(0.5)
        raise RuntimeError((c.here / "serve.log").read_text()[-500:])

    def get(self, path: str, timeout: float = 10) -> tuple[int, bytes]:
        """Status and body; status 0 where nobody answers in time."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as made:
                made.settimeout(timeout)
                made.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                data = b""
                while part := made.recv(65536):
                    data += part
            head, _, body = data.partition(b"\r\n\r\n")
            return int(head.split()[1]), body
        except (OSError, IndexError, ValueError):
            return 0, b""

    def stop(self) -> None:
        """End the server."""
        self.child.terminate()
        self.child.wait(30)
        self.log.close()


@entry
def f4(c: Case) -> None:
    """Slow clients take nobody's place."""
    c.bundle()
    server = Server(c, "--device", "cpu")
    try:
        post = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
        slow = []
        for i in range(96):
            made = socket.create_connection(("127.0.0.1", server.port))
            made.sendall(
                post + (b"Content-Length: 100000\r\nContent-Type: image/jpeg\r\n\r\nxx" if i % 2 else b"X-A: ")
            )
            slow.append(made)
        time.sleep(1)
        start = time.perf_counter()
        status, _ = server.get("/health")
        c.check(status == 200, f"/health beside slow clients: {status}")
        image = next((c.here / "data/test/iris").iterdir()).read_bytes()
        head = f"Connection: close\r\nContent-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as made:
            made.sendall(post + head.encode() + image)
            answer = made.recv(65536)
        c.check(answer.startswith(b"HTTP/1.1 200"), f"/predict beside slow clients: {answer[:120]!r}")
        c.last = f"answered {answer[:15]!r} after {time.perf_counter() - start:.1f} s beside 96 slow clients"
        for made in slow[:2]:  # headers and body that never end are ended
            made.settimeout(90)
            try:
                c.check(True, "") if made.recv(1000) is not None else None
            except TimeoutError:
                c.check(False, "a request that never ends is kept for more than 90 s")
            except OSError:
                pass
        for made in slow:
            made.close()
    finally:
        server.stop()


@entry
def f5(c: Case) -> None:
    """A file of weights is held to its own numbers."""
    import torch

    for form, name in (
        ("glsim", "encoder.blocks.{}.norm1.weight"),
        ("transfg", "transformer.encoder.layer.{}.attention_norm.weight"),
    ):
        torch.save({"model": {name.format(i): torch.zeros(1) for i in range(20_000)}}, c.here / f"{form}.pth")
        said = c.refused("convert", f"{form}.pth", f"b{form}", "--method", form, code=(1, 2, 3))
        c.check(said.seconds < 30 and said.peak < 2 * GIB, f"{form}: {said.seconds:.0f} s, {said.peak / GIB:.1f} GiB")


@entry
def f6(c: Case) -> None:
    """Messages and addresses of absurd length."""
    import torch
    from safetensors.torch import save_file

    run = c.bundle()
    image = next((c.here / "data/test/iris").iterdir())
    server = Server(c)
    try:
        for path in ("/examples/" + "9" * 6000, "/examples/-1", "/examples/x", "/none", "/examples/" + "9" * 30):
            status, body = server.get(path)
            c.check(status in (400, 404, 405, 414, 422), f"GET {path[:30]}: {status} {body[:80]!r}")
    finally:
        server.stop()
    save_file({f"name{i}": torch.zeros(1) for i in range(100_000)}, run / "model.safetensors")
    said = c.refused("predict", "run", image, "--workers", 0)
    c.check(len(said.err) < 20_000 and len(said.text) < 5_000, f"a message of {len(said.text)} characters")


# --- G ----------------------------------------------------------------------------------------------------------------


@entry
def g1(c: Case) -> None:
    """Names act on no terminal."""
    c.bundle()
    folder = c.images("p", 1)
    name = "a\x1b]0;title\x07\x1b[31m\nb\u202egpj.jpg"
    (folder / "000.jpg").rename(folder / name)
    (folder / "\x1b[2Jbad.jpg").write_bytes(b"x")
    for words in (
        ["predict", "run", str(folder), "--skip-bad"],
        ["predict", "run", str(folder)],
        ["predict", "run", str(folder / "no\x1b[31mne.jpg")],
    ):
        done = subprocess.run([sys.executable, "-m", "glsim.cli", *words], cwd=c.here, capture_output=True)
        shown = done.stdout + done.stderr
        c.check(
            b"\x1b" not in shown and b"\x07" not in shown and "\u202e".encode() not in shown,
            f"{words}: {shown[:300]!r}",
        )


@entry
def g2(c: Case) -> None:
    """Cells of a CSV are no formulas."""
    c.bundle()
    config = json.loads((c.here / "run/config.json").read_text())
    config["label_names"] = ["=cmd|' /C calc'!A0", "+1+1", "@SUM(1)"]
    (c.here / "run/config.json").write_text(json.dumps(config))
    folder = c.images("p", 1)
    (folder / "000.jpg").rename(folder / "=1+1.jpg")
    c.fine("predict", "run", folder, "--out", "answers.csv", "--workers", 0)
    with (c.here / "answers.csv").open(newline="", encoding="utf-8-sig") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    bad = [cell for cell in cells if cell[:1] in "=+-@\t\r" and cell and not number(cell)]
    c.check(cells and not bad, f"{bad[:3]}")


def number(text: str) -> bool:
    """Whether a cell is a number."""
    try:
        float(text)
        return True
    except ValueError:
        return False


@entry
def g3(c: Case) -> None:
    """A label writes no lines of the model card."""
    from glsim import load, save

    run = c.bundle()
    model = load(run)
    save(model, c.here / "card", labels=["a\n# Owned\n", "b\r\n- [x](http://x)", "---\nlicense: none"])
    card = (c.here / "card/README.md").read_text()
    c.check("\n# Owned" not in card and "\n---\nlicense: none" not in card and "\n- [x]" not in card, card[:600])


@entry
def g4(c: Case) -> None:
    """A source inside a file is not fetched unasked."""
    c.bundle()
    c.fine("index", "build", "run", "--data", "data", "--out", "ix", "--split", "train", "--workers", 0)
    table = json.loads((c.here / "ix/index.json").read_text())
    table["source"] = "hf-hub:owner/none"
    (c.here / "ix/index.json").write_text(json.dumps(table))
    image = next((c.here / "data/test/iris").iterdir())
    said = c.refused("index", "query", "ix", image, "--workers", 0, env={"HF_HUB_OFFLINE": "0"}, says="--source")
    c.check(said.seconds < 60, f"{said.seconds:.0f} s")


def reproduce(name: str, top: Path) -> dict[str, Any]:
    """Run one entry; returns its row."""
    case, start = Case(name, top / name), time.perf_counter()
    try:
        ENTRIES[name](case)
    except Exception as error:
        case.check(False, f"{type(error).__name__}: {error}")
    about = (ENTRIES[name].__doc__ or "").strip()
    row = {"entry": name, "about": about, "checks": case.checks, "wrong": case.wrong, "last": case.last}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    """Run the entries and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ENTRIES), help="entries, as B1 E1")
    parser.add_argument("--jobs", type=int, default=2, help="entries at a time")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda name: reproduce(name, Path(folder)), [n.upper() for n in args.only]):
            failed += bool(row["wrong"])
            state = "right" if not row["wrong"] else "WRONG"
            about = f"{row['about']} | {state} | {row['checks']} checks, {row['seconds']} s"
            print(f"| {row['entry']} | {about} | {row['last'][:160]!r} |", flush=True)
            for wrong in row["wrong"]:
                print(f"    {wrong}", flush=True)
    print(
        f"{failed} of {len(args.only)} entries are not right" if failed else f"all {len(args.only)} entries are right"
    )
    return 4 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
