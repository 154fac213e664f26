"""The look before training: every fault is put into a clean data set and must be found, alone."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, write
from PIL import Image
from torch import nn

from glsim import cli
from glsim.cli import doctor
from glsim.data import audit, audit_page, duplicates
from glsim.data.images import BadImage
from glsim.files import document
from glsim.models import create_model
from glsim.training import memory
from glsim.training.config import Train
from glsim.types import ConfigError, DataError, GlsimError, Output

PLAN = dict(backbone="vit_tiny_patch16_224", image_size=64, backbone_args=SMALL, options={"top_o": 4}, device="cpu")
WORDS = ["--backbone=vit_tiny_patch16_224", "--image-size=64", f"--backbone-args={json.dumps(SMALL)}", "--device=cpu"]


def picture(seed, size=(96, 64)):
    """Noise whose amplitude falls with the frequency, as in photographs; no two seeds look alike."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width)[..., None]
    waves = np.fft.fft2(np.random.default_rng(seed).normal(size=(height, width, 3)), axes=(0, 1)) / (1 + frequency)
    values = np.fft.ifft2(waves, axes=(0, 1)).real
    return Image.fromarray((128 + 50 * values / values.std().clip(1e-9)).clip(0, 255).astype(np.uint8))


@pytest.fixture
def data(tmp_path):
    """3 classes, 6 training and 2 test images each, nothing wrong with them."""
    for c, label in enumerate(("ash", "elm", "oak")):
        for split, count in (("train", 6), ("test", 2)):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(count):
                seed = 100 * c + 10 * i + (split == "test")
                picture(seed).save(tmp_path / "data" / split / label / f"{i}.jpg", quality=90)
    return tmp_path / "data"


def look(data, **settings):
    options = {"data": str(data), "out": str(data.parent / "page.html"), "workers": 0, **PLAN, **settings}
    return document(doctor.run(doctor.Options(**options), progress=False))


def text_of(page):
    """The page without the places where a name may go over two lines."""
    return page.read_text().replace("<wbr>", "")


def checks(result):
    """check -> its items, as (sorted file names below the data, note)."""
    found = {}
    for f in result["findings"]:
        assert f["count"] == len(f["items"]) and audit.CHECKS[f["check"]][0] == f["severity"]
        found[f["check"]] = [
            (sorted("/".join(image["path"].split("/")[-3:]) for image in item["images"]), item["note"])
            for item in f["items"]
        ]
    return found


# --- what is wrong with the data --------------------------------------------------------------------------------------


def test_nothing_found(data):
    result = look(data)
    assert checks(result) == {} and result["exit_code"] == 0
    assert result["counts"] == {"train": 18, "test": 6} and not result["split_drawn"]
    assert result["classes"]["train"] == {"smallest": ["ash", 6], "median": 6, "largest": ["ash", 6]}
    assert result["classes"]["imbalance"] == 1
    assert "Nothing found" in (data.parent / "page.html").read_text()


def damage(data, what):
    """Put one fault into the data; returns the findings to expect."""
    ash, elm, test = data / "train" / "ash", data / "train" / "elm", data / "test" / "ash"
    if what == "truncated":
        (ash / "3.jpg").write_bytes((ash / "3.jpg").read_bytes()[:700])
        return {"unreadable": [["train/ash/3.jpg"]]}
    if what == "exact copy in the other split":
        shutil.copy(ash / "0.jpg", test / "copy.jpg")
        return {"leak": [["test/ash/copy.jpg", "train/ash/0.jpg"]]}
    if what == "same pixels, other file":
        with Image.open(ash / "0.jpg") as image:
            image.save(test / "copy.png")
        return {"leak": [["test/ash/copy.png", "train/ash/0.jpg"]]}
    if what == "exact copy under another label":
        shutil.copy(ash / "0.jpg", elm / "copy.jpg")
        return {"clash": [["train/ash/0.jpg", "train/elm/copy.jpg"]]}
    if what == "exact copy under another label in the other split":
        shutil.copy(elm / "0.jpg", test / "copy.jpg")
        return {name: [["test/ash/copy.jpg", "train/elm/0.jpg"]] for name in ("leak", "clash")}
    if what == "exact copies in the class":
        for i in range(2):
            shutil.copy(ash / "0.jpg", ash / f"copy{i}.jpg")
        return {"duplicate": [["train/ash/0.jpg", "train/ash/copy0.jpg", "train/ash/copy1.jpg"]]}
    if what == "small copy in the other split":
        with Image.open(ash / "0.jpg") as image:
            image.resize((60, 40)).save(test / "copy.jpg", quality=50)
        return {"near_leak": [["test/ash/copy.jpg", "train/ash/0.jpg"]]}
    if what == "grey copy under another label":
        with Image.open(ash / "0.jpg") as image:
            image.convert("L").save(elm / "copy.jpg", quality=70)
        return {"near_clash": [["train/ash/0.jpg", "train/elm/copy.jpg"]]}
    if what == "compressed copy in the class":
        with Image.open(ash / "0.jpg") as image:
            image.save(ash / "copy.webp", quality=30)
        return {"near_duplicate": [["train/ash/0.jpg", "train/ash/copy.webp"]]}
    if what == "black":
        Image.new("RGB", (96, 64), (3, 2, 1)).save(ash / "black.png")
        Image.new("RGB", (90, 64), (3, 2, 1)).save(elm / "black.png")  # not taken for a near copy of the other one
        return {"blank": [["train/ash/black.png"], ["train/elm/black.png"]]}
    if what == "png named jpg":
        picture(7).save(ash / "7.jpg", "PNG")
        return {"suffix": [["train/ash/7.jpg"]]}
    if what == "unknown ending":
        picture(7).save(ash / "7.dat", "PNG")
        write(ash / ".hidden", "")
        return {"unseen": [["train/ash/7.dat"]]}
    if what == "class of 4":
        for i in (4, 5):
            (ash / f"{i}.jpg").unlink()
        return {"few": [[]]}
    if what == "class without test images":
        shutil.rmtree(test)
        return {"absent": [[]]}
    raise AssertionError(what)


FAULTS = {
    "truncated": 3,
    "exact copy in the other split": 3,
    "same pixels, other file": 3,
    "exact copy under another label": 3,
    "exact copy under another label in the other split": 3,
    "exact copies in the class": 0,
    "small copy in the other split": 0,
    "grey copy under another label": 0,
    "compressed copy in the class": 0,
    "black": 0,
    "png named jpg": 0,
    "unknown ending": 0,
    "class of 4": 0,
    "class without test images": 0,
}


@pytest.mark.parametrize("what", FAULTS)
def test_each_fault_is_found_and_nothing_else(data, what):
    expected = damage(data, what)
    result = look(data)
    found = checks(result)
    assert {name: [paths for paths, _ in items] for name, items in found.items()} == expected
    assert result["exit_code"] == FAULTS[what]
    page = text_of(data.parent / "page.html")
    for items in found.values():
        assert ("Of 13 checks" in page) == bool(found)
        for paths, note in items:
            assert all(path in page for path in paths) and note in page


def test_what_the_notes_say(data):
    for what in ("truncated", "png named jpg", "class of 4", "class without test images"):
        damage(data, what)
    found = checks(look(data))
    assert found["unreadable"][0][1].startswith("truncated: ")
    assert found["suffix"][0][1] == "PNG named .jpg"
    assert found["few"] == [([], "ash: 4")]  # 6, less two removed, less one damaged, and the misnamed one
    assert found["absent"][0][1] == "ash: none in test"


def test_every_near_copy_of_a_copied_picture_is_named(data):
    """0.jpg is in both splits; its small copy is a near duplicate of the one and a near leak of the other."""
    damage(data, "exact copy in the other split")
    with Image.open(data / "train" / "ash" / "0.jpg") as image:
        image.resize((60, 40)).save(data / "train" / "ash" / "small.jpg")
    found = checks(look(data))
    assert [paths for paths, _ in found["near_leak"]] == [["test/ash/copy.jpg", "train/ash/small.jpg"]]
    assert [paths for paths, _ in found["near_duplicate"]] == [["train/ash/0.jpg", "train/ash/small.jpg"]]
    note = found["near_leak"][0][1]
    assert 0 <= int(re.fullmatch(r"(\d+) of 256 bits differ", note)[1]) <= 32


def test_near_is_a_setting(data):
    with Image.open(data / "train" / "ash" / "0.jpg") as image:
        image.crop((6, 4, 96, 64)).save(data / "test" / "ash" / "crop.jpg")
    assert "near_leak" not in checks(look(data, near=0))
    assert "near_leak" in checks(look(data, near=110))


def test_what_train_refuses(data):
    shutil.rmtree(data / "train" / "elm")
    for folder in ("train/oak", "test/oak", "test/elm"):
        shutil.rmtree(data / folder)
    assert checks(look(data)) == {"untrainable": [([], "one class only: ash")]}
    for i in range(6):
        (data / "train" / "ash" / f"{i}.jpg").write_bytes(b"")
    found = checks(look(data))
    assert [note for _, note in found["untrainable"]] == ["one class only: ash", "no readable training image of ash"]
    assert len(found["unreadable"]) == 6
    rows = [f"test/ash/{i}.jpg,ash,test" for i in range(2)]
    listed = write(data / "list.csv", "path,label,split", *rows)
    result = look(listed)
    assert checks(result)["untrainable"] == [([], "no split 'train'; there is: test")] and result["exit_code"] == 3


def test_data_without_splits(data):
    result = look(data / "train")
    assert result["split_drawn"] and result["counts"] == {"train": 15, "test": 3}
    assert "drawn as train draws them" in (data / "page.html").read_text()


def test_nothing_readable(tmp_path):
    for label in "ab":
        write(tmp_path / "data" / label / "x.jpg", "no")
    result = look(tmp_path / "data")
    assert result["sizes"] == {} and len(checks(result)["unreadable"]) == 2 and result["exit_code"] == 3


def test_sizes(data):
    picture(7, (300, 30)).save(data / "train" / "ash" / "long.png")
    sizes = look(data)["sizes"]
    assert sizes["width"] == {"smallest": 96, "5 %": 96, "median": 96, "95 %": 96, "largest": 300}
    assert sizes["height"]["smallest"] == 30 and sizes["aspect"]["largest"] == 10
    assert sizes["smaller_than_image_size"] == 1 and sizes["elongated"] == 1
    assert sizes["largest"]["size"] == [300, 30] and sizes["largest"]["path"].endswith("long.png")
    assert sizes["smallest"]["size"] == [96, 64]
    assert sizes["formats"] == {"JPEG": 24, "PNG": 1} and sizes["modes"] == {"RGB": 25}


# --- its parts --------------------------------------------------------------------------------------------------------


def test_look_at(tmp_path):
    picture(0, (50, 30)).convert("CMYK").save(tmp_path / "x.jpg")
    photo = duplicates.look_at([tmp_path / "x.jpg"])[0]
    assert (photo.size, photo.format, photo.mode, len(photo.hash)) == ((50, 30), "JPEG", "CMYK", 32)
    picture(0, (1, 1)).save(tmp_path / "dot.png")
    assert duplicates.look_at([tmp_path / "dot.png"])[0].hash is None
    assert isinstance(duplicates.look_at([tmp_path / "none.jpg"])[0], BadImage)
    # The same bytes in another shape are another picture.
    for name, size in (("a.png", (8, 4)), ("b.png", (4, 8))):
        Image.frombytes("RGB", size, bytes(range(96))).save(tmp_path / name)
    assert duplicates.look_at([tmp_path / "a.png"])[0].pixels != duplicates.look_at([tmp_path / "b.png"])[0].pixels


def test_processes_find_the_same(data):
    damage(data, "truncated")
    paths = sorted((data / "train").rglob("*.jpg"))
    here, there = ([str(x) for x in duplicates.look_at_all(paths, workers)] for workers in (0, 2))
    assert here == there and len(here) == 18


def test_a_process_that_dies_is_one_sentence(monkeypatch):
    with pytest.raises(GlsimError, match="--workers 1"):
        list(duplicates.look_at_all([Crash()], 1))


class Crash:
    """Stands for a file that crashes its decoder."""

    def __fspath__(self):
        os._exit(1)


@pytest.mark.parametrize("most", [0, 1, 32, 100])
def test_near_pairs_against_a_loop(most):
    random_bits = np.random.default_rng(0)
    hashes = random_bits.integers(0, 2**63, (150, 4), dtype=np.uint64)
    hashes[70] = hashes[3]
    for i in range(100, 150):  # copies of others, with a few bits turned
        for bit in random_bits.integers(0, 256, i - 100):
            hashes[i, bit // 64] = hashes[i - 90 if bit == 0 else i, bit // 64] ^ np.uint64(1 << int(bit % 64))
        if i % 2:
            hashes[i] = hashes[i - 100] ^ np.uint64(2**20 - 1)
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    expected = [(i, j, int((bits[i] != bits[j]).sum())) for i in range(150) for j in range(i + 1, 150)]
    expected = sorted((p for p in expected if p[2] <= most), key=lambda p: (p[2], p))
    assert duplicates.near_pairs(hashes, most, 10**6, rows=7) == expected and expected
    assert len(duplicates.near_pairs(hashes, 256, 50)) == 50
    assert duplicates.near_pairs(hashes[:0], most, 9) == []


def test_near_pairs_beyond_one_block():
    hashes = np.random.default_rng(1).integers(0, 2**63, (9000, 4), dtype=np.uint64)
    hashes[8999], hashes[4097] = hashes[0], hashes[4096]
    assert duplicates.near_pairs(hashes, 20, 100) == [(0, 8999, 0), (4096, 4097, 0)]


def test_a_search_that_stops_says_so(data, monkeypatch):
    damage(data, "compressed copy in the class")
    for module in (duplicates, audit, audit_page):
        monkeypatch.setattr(module, "PAIRS", 1)
    assert look(data)["near_search_stopped"]
    assert "stopped at 1 pairs" in (data.parent / "page.html").read_text()


# --- the command line and the page ------------------------------------------------------------------------------------


def call(capsys, *words):
    code = cli.main(["doctor", *map(str, words), *WORDS])
    out, err = capsys.readouterr()
    return code, out, err


def test_200_corrupt_among_1000(capsys, tmp_path):
    """Every one is named, with the reason, by the JSON document, by the text and by the page; nothing else is."""
    dice, bad = random.Random(0), set()
    for i in range(1000):
        path = tmp_path / "data" / ("train", "test")[i % 5 == 4] / f"class{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (48, 32)).save(path)
        if i % 5 == 0:
            bad.add(str(path))
            whole = path.read_bytes()
            path.write_bytes(dice.choice([b"", b"<html>", whole[: len(whole) // 2], os.urandom(300)]))
    code, out, _ = call(capsys, tmp_path / "data", "--out", tmp_path / "page.html", "--json")
    assert code == 3
    result = json.loads(out)
    assert result["exit_code"] == 3 and result["counts"] == {"train": 800, "test": 200}
    (unreadable,) = [f for f in result["findings"] if f["check"] == "unreadable"]
    assert {image["path"] for item in unreadable["items"] for image in item["images"]} == bad
    assert all(item["note"] for item in unreadable["items"]) and unreadable["count"] == 200
    code, out, _ = call(capsys, tmp_path / "data", "--out", tmp_path / "page.html", "--workers", "0")
    assert code == 3
    assert {line.split(":")[0].strip() for line in out.splitlines() if line.startswith("  ") and ".jpg" in line} >= bad
    page = text_of(tmp_path / "page.html")
    assert all(path.removeprefix(f"{tmp_path}/data/") in page for path in bad)


def test_text_for_people(capsys, data):
    code, out, err = call(capsys, data, "--out", data.parent / "page.html")
    assert code == 0 and "nothing found" in out and "18 train, 6 test images of 3 classes" in out
    assert "memory of a step: about" in out and f"page: {data.parent / 'page.html'}" in out and "image" in err
    damage(data, "exact copy in the other split")
    code, out, _ = call(capsys, data, "--out", data.parent / "page.html", "--batch-size", "100000000")
    assert code == 3 and "problem: The same picture in two splits: 1." in out
    assert f"  {data}/train/ash/0.jpg = {data}/test/ash/copy.jpg\n" in out
    assert "it will not fit; what helps:\n  --batch-size" in out


def test_wrong_settings_and_missing_data(capsys, data, tmp_path):
    for words, code, said in (
        ([tmp_path / "none"], 3, "does not exist"),
        ([data, "--backbone", "vit_none"], 2, "vit_none"),
        ([data, "--near", "-1"], 2, "near=-1: at least 0"),
        ([data, "--optimizer", "best"], 2, "unknown optimizer 'best'"),
        ([data, "--out", tmp_path], 2, "is a folder; name a file"),
        ([data, "--out", tmp_path / "none" / "page.html"], 2, "name a file, in a folder that is there"),
    ):
        got = cli.main(["doctor", *WORDS, "--out", str(tmp_path / "page.html"), *map(str, words)])
        out, err = capsys.readouterr()
        assert got == code and said in err and not out, (words, err)
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(DataError):
        audit.list_images(tmp_path / "none")
    with pytest.raises(ConfigError):
        doctor.Options(data="d", method="none")


class Page(HTMLParser):
    """The tags of a page, each of which must be closed, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file_and_stays_small(data, monkeypatch):
    for what in FAULTS:
        damage(data, what)
    for i in range(10):
        shutil.copy(data / "train" / "oak" / "0.jpg", data / "train" / "elm" / f"<b>{i}.jpg")
    monkeypatch.setattr(audit_page, "SHOWN", 1)
    look(data)
    text = (data.parent / "page.html").read_text()
    sources = Page(text).sources
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert "<b>0.jpg" not in text and "&lt;b&gt;9.jpg" in text  # pictures of four at most, all by name
    assert sum(source.startswith("data:") for source in sources) <= 4 * len(audit.CHECKS)
    assert "more</summary>" in text
    monkeypatch.setattr(audit_page, "NAMED", 1)
    look(data)
    assert "glsim doctor --json lists all" in (data.parent / "page.html").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are no text")
def test_file_names_that_are_no_text(capsys, data):
    (data / "train" / "ash" / os.fsdecode(b"\xff.jpg")).write_bytes(b"no")
    code, out, _ = call(capsys, data, "--out", data.parent / "page.html", "--json")
    (finding,) = json.loads(out)["findings"]
    assert code == 3 and os.fsencode(finding["items"][0]["images"][0]["path"]).endswith(b"\xff.jpg")
    code, out, _ = call(capsys, data, "--out", data.parent / "page.html")
    assert code == 3 and r"\udcff.jpg: not an image" in out
    assert r"\udcff.jpg" in (data.parent / "page.html").read_text()


# --- memory -----------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Linear, ReLU, linear: what autograd keeps can be counted by hand."""

    def __init__(self, side=16, classes=5):
        super().__init__()
        width = 3 * side * side
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, classes)
        self.config = SimpleNamespace(num_classes=classes, image_size=[side, side])

    def forward(self, images):
        return Output(self.second(self.first(images.flatten(1)).relu()))


def test_activations_against_a_closed_form():
    """Kept: the images, the ReLU's result (which is the second layer's input: once), the log-probabilities, labels."""
    width, classes, small = 3 * 16 * 16, 5, 64
    fixed, each = memory.measure_activations(Two(), "no")
    exact = 4 * width + 4 * width + 4 * classes + 8
    assert exact <= each <= exact + small and fixed <= small
    # bf16: both inputs at 2 bytes; once, whatever the batch, the weights at 2 bytes that a gradient goes back through.
    fixed, each = memory.measure_activations(Two(), "bf16")
    exact = 2 * width + 2 * width + 4 * classes + 8
    assert exact <= each <= exact + small
    assert 0 <= fixed - 2 * width * classes <= small


def estimate(**settings):
    return memory.estimate_memory(7, **{**PLAN, **settings})


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 1), ("adamw", 2)])
def test_weights_and_state_are_counted(optimizer, states):
    m = estimate(optimizer=optimizer)
    model = create_model("glsim", "vit_tiny_patch16_224", 7, 64, backbone_args=SMALL, top_o=4)
    count = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert m.parameters == count and m.weights == 4 * count + buffers
    assert m.gradients == 4 * count
    assert 0 <= m.optimizer - 4 * count * states <= 8 * len(list(model.parameters()))  # AdamW counts its steps


def test_every_further_image_costs_the_same():
    model = create_model("glsim", "vit_tiny_patch16_224", 7, 64, backbone_args=SMALL, top_o=4).train()
    fixed, each = memory.measure_activations(model, "no")
    assert memory.saved_bytes(model, 11, "no") == pytest.approx(fixed + 11 * each, rel=1e-3)
    m = estimate(batch_size=11)
    assert m.activations == pytest.approx(fixed + 11 * each, rel=1e-3)
    assert estimate(method="plain", options={}).activations_per_image < 0.7 * each  # one pass instead of two


def test_frozen_blocks_need_no_memory():
    whole, part = estimate(), estimate(freeze=1)
    assert part.activations < 0.7 * whole.activations
    assert part.gradients < 0.7 * whole.gradients and part.optimizer < 0.7 * whole.optimizer


def test_what_fits(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    m = estimate()
    assert m.fits and m.advice == [] and m.free == 10**9 and m.device == "cpu"
    largest = m.largest_batch_size
    assert estimate(batch_size=largest).fits and estimate(batch_size=largest).total <= 10**9
    too_much = estimate(batch_size=largest + 1)
    assert not too_much.fits and too_much.total > 10**9


def test_what_to_change(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**8)
    planned = 2 * estimate().largest_batch_size
    m = estimate(batch_size=planned)
    assert not m.fits
    smaller, half, pixels, last = m.advice
    batch, accumulate = map(int, re.match(r"--batch-size (\d+) --accumulate (\d+):", smaller).groups())
    assert batch * accumulate >= planned and estimate(batch_size=batch).fits
    now, then = re.match(r"--precision bf16: (.*) instead of (.*)", half).groups()
    assert now == memory.as_gib(estimate(batch_size=planned, precision="bf16").total)
    assert then == memory.as_gib(m.total)
    assert pixels == "--image-size 32 or smaller"
    assert last == "a smaller --backbone, or a device with more memory"


def test_when_not_even_the_weights_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**5)
    m = estimate(precision="bf16")
    assert m.largest_batch_size == 0 and m.advice == ["a smaller --backbone, or a device with more memory"]


def test_defaults_are_those_of_train():
    ours, theirs = ({f.name: f for f in dataclasses.fields(c)} for c in (doctor.Options, Train))
    for name in set(ours) & set(theirs) - {"data", "out", "workers"}:
        assert (ours[name].default, ours[name].type) == (theirs[name].default, theirs[name].type), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_free_memory_of_a_device():
    assert 0 < memory.free_bytes(torch.device("cuda")) <= torch.cuda.get_device_properties(0).total_memory
