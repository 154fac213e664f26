from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, scene, touch, write
from PIL import Image

from glsim import cli
from glsim.data.image_files import find_images
from glsim.data.images import BadImage, find_bad
from glsim.data.loaders import ImageDataset
from glsim.data.readers import SPLITS, ImageList, hold_out, hold_out_val, read_data, split_hash
from glsim.files import make_folder, make_parent
from glsim.training import components
from glsim.training.config import Train
from glsim.types import ConfigError, DataError, DataWarning

FLOWERS = ROOT.parent / "shared" / "data" / "flowers12"


def as_pairs(images: ImageList, root: Path) -> list[tuple[str, str]]:
    return [
        (p.relative_to(root).as_posix(), images.classes[label])
        for p, label in zip(images.paths, images.labels, strict=True)
    ]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_import_does_not_need_torch():
    code = "import sys, glsim.data.readers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_split_folders(tmp_path):
    touch(tmp_path, "train/b/1.jpg", "train/b/deep/er/2.PNG", "train/a/1.jpeg", "valid/a/9.webp", "Test/b/3.tiff")
    touch(tmp_path, "masks/a/1.png", ".hidden/a/1.png", "train/a/._1.jpg", "train/a/notes.txt", "train/a/.cache/x.jpg")
    (tmp_path / "valid" / "b").mkdir()
    with pytest.warns(DataWarning, match=r": left out 1 file: 1 \.txt$"):
        splits = read_data(tmp_path)
    assert list(splits) == list(SPLITS)
    assert as_pairs(splits["train"], tmp_path) == [
        ("train/a/1.jpeg", "a"),
        ("train/b/1.jpg", "b"),
        ("train/b/deep/er/2.PNG", "b"),
    ]
    assert as_pairs(splits["val"], tmp_path) == [("valid/a/9.webp", "a")]
    assert as_pairs(splits["test"], tmp_path) == [("Test/b/3.tiff", "b")]
    assert all(images.classes == ("a", "b") for images in splits.values())
    with pytest.warns(DataWarning, match="left out 1 file"):
        assert len(splits["train"]) == 3 and read_data(str(tmp_path)) == splits


def test_validation_is_val_and_only_existing_splits_come_back(tmp_path):
    touch(tmp_path, "TRAIN/a/1.jpg", "validation/a/1.jpg")
    assert list(read_data(tmp_path)) == ["train", "val"]
    assert list(read_data(touch(tmp_path / "only", "test/z/1.jpg"))) == ["test"]


def test_two_folders_for_one_split(tmp_path):
    with pytest.raises(DataError, match=r"val.* and .*valid.* are both the 'val' split"):
        read_data(touch(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"))


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("training", "validation_set", "testing"),
        ("training_set", "Valid", "test_set"),
        ("train_images", "val-images", "test_images"),
        ("TrainData", "dev", "TestData"),
        ("trainset", "evaluation", "Test Images"),
        ("trn", "eval", "tst"),
    ],
)
def test_the_usual_names_of_splits(tmp_path, train, val, test):
    splits = read_data(touch(tmp_path, f"{train}/a/1.jpg", f"{train}/b/1.jpg", f"{val}/a/1.jpg", f"{test}/b/1.jpg"))
    assert {split: [p.parent.parent.name for p in images.paths] for split, images in splits.items()} == {
        "train": [train, train],
        "val": [val],
        "test": [test],
    }
    lines = ["path,label,split", f"{train}/a/1.jpg,a,{train}", f"{val}/a/1.jpg,a,{val}", f"{test}/b/1.jpg,a,{test}"]
    assert list(read_data(write(tmp_path / "all.csv", *lines))) == list(SPLITS)
    for name, image in ((train, f"{train}/a/1.jpg"), (test, f"{test}/b/1.jpg")):
        write(tmp_path / f"{name}.csv", "path,label", f"{image},c")
    with pytest.warns(DataWarning, match=f"left out .*{val}, as {train}.csv, {test}.csv say what is read"):
        assert {split: images.classes for split, images in read_data(tmp_path).items()} == {
            "train": ("c",),
            "test": ("c",),
        }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/1.jpg", "train2/a/1.jpg"], r"train/ beside train2/ may be splits, or classes"),
        (["train/a/1.jpg", "my_test/a/1.jpg"], r"move away or rename my_test/; for classes, rename .* or give a list"),
        (["train/a/1.jpg", "test/a/1.jpg", "test-old/a/1.jpg"], r"train/.*beside test-old/"),
        (["train/a/1.jpg", "Testdaten/a/1.jpg"], r"beside Testdaten/"),
        (["train/a/1.jpg", "fold1/b/1.jpg"], r"beside fold1/"),
        (["train2/a/1.jpg", "test2/a/1.jpg"], r"test2/, train2/ may be splits by names .* known are train, training"),
        (["train2/1.jpg", "test2/1.jpg"], r"test2/, train2/ may be splits by names"),
        (["my_train/a/1.jpg", "bus/1.jpg"], r"my_train/ may be splits"),
        (["Trainingsdaten/a/1.jpg", "Testdaten/a/1.jpg"], r"Testdaten/, Trainingsdaten/ may be splits"),
        (["fold0/a/1.jpg", "fold1/a/1.jpg"], r"fold0/, fold1/ may be splits"),
        (["here/a/1.jpg", "here/b/1.jpg", "here/c/1.jpg", "there/a/1.jpg", "there/b/1.jpg"], r"here/, there/ may be"),
        (["bus/1.jpg", "car/1.jpg", "train/steam/1.jpg", "train/diesel/1.jpg"], r"train/ beside bus/, car/ may be splits, or classes\. For splits, move away or rename bus/, car/; for classes, rename the folders"),
        (["bus/1.jpg", "train/1.jpg"], r"train/ beside bus/ may be splits, or classes"),
        (["bus/old/1.jpg", "Test/steam/1.jpg"], r"Test/ beside bus/"),
        (["bus/1.jpg", "val/a/1.jpg", "test/b/1.jpg"], r"test/, val/ beside bus/"),
        (["trainval/a/1.jpg", "val/a/1.jpg"], r"val: by its name a part of .*trainval; keep one of them"),
        (["trainval/a/1.jpg", "train/a/1.jpg"], r"are both the 'train' split"),
        (["a/train/1.jpg", "a/test/1.jpg", "b/train/1.jpg"], r"folders of splits lie in those of classes, as in .*a; what works: train/CLASS"),
        (["train/train/a/1.jpg", "test/test/a/1.jpg"], r"test: holds test, not classes; move up"),
        (["zip/flowers/train/a/1.jpg", "zip/flowers/test/a/1.jpg", "__MACOSX/zip/._x.jpg"], r"nothing but zip/; the data set seems to be .*zip.flowers: name that"),
        (["flowers/a/1.jpg", "flowers/b/1.jpg"], r"nothing but flowers/; the data set seems to be .*flowers: name that"),
    ],
)  # fmt: skip
def test_folders_that_may_be_splits_or_classes(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        read_data(touch(tmp_path, *names))


@pytest.mark.parametrize(
    "names",
    [
        ["bus/1.jpg", "train_station/1.jpg", "test tube/1.jpg"],
        ["daisy/2020/1.jpg", "daisy/2021/1.jpg", "iris/2020/1.jpg", "iris/2021/1.jpg", "rose/2020/1.jpg"],
        ["daisy/images/1.jpg", "iris/images/1.jpg"],
        ["trainer/1.jpg", "testament/1.jpg", "value/1.jpg"],
    ],
)
def test_classes_that_resemble_splits_stay_classes(tmp_path, names):
    images = read_data(touch(tmp_path, *names), test_fraction=0)["train"]
    assert images.classes == tuple(sorted({name.split("/")[0] for name in names})) and len(images) == len(names)


def test_what_is_left_out_is_told(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/a/1.txt", "train/a/2.TXT", "train/a/raw", "train/2.jpg")
    touch(tmp_path, "extra/a/1.jpg", "extra/b/2.jpg", "notes/a/1.md", "train_masks/a/1.png")
    with pytest.warns(DataWarning) as told:
        assert len(read_data(tmp_path)["train"]) == 1
    said = sorted(str(warning.message).removeprefix(f"{tmp_path}: ") for warning in told)
    assert said == [
        f"left out {tmp_path / 'extra'} (2 images), which is no split",
        "left out 1 images outside of class folders, as " + str(tmp_path / "train" / "2.jpg"),
        "left out 3 files: 2 .txt, 1 without an ending",
    ]


@pytest.mark.parametrize(
    "junk",
    ["@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", ".ipynb_checkpoints", "lost+found", "#recycle",
     "#snapshot", ".AppleDouble", "@Recycle"],
)  # fmt: skip
def test_junk_is_no_data(tmp_path, junk):
    touch(tmp_path, "d/a/1.jpg", "d/b/1.jpg", f"d/{junk}/x/1.jpg", f"d/a/{junk}/1.jpg/THUMB.jpg", f"d/a/{junk}/t.jpg")
    touch(tmp_path, "d/a/Thumbs.db", "d/a/desktop.ini", "d/a/.DS_Store", "d/a/._1.jpg", "d/~$list.csv")
    assert as_pairs(read_data(tmp_path / "d", test_fraction=0)["train"], tmp_path / "d") == [
        ("a/1.jpg", "a"),
        ("b/1.jpg", "b"),
    ]
    for given in (tmp_path / "d", tmp_path / "d" / "**" / "*"):
        assert find_images(given) == [tmp_path / "d" / "a" / "1.jpg", tmp_path / "d" / "b" / "1.jpg"]


def test_folders_that_glsim_wrote_are_no_data(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    touch(make_folder(tmp_path / "runs" / "one"), "sheet.jpg")
    touch(make_folder(tmp_path / "a" / "pictures"), "1.jpg")
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "empty")
    make_parent(tmp_path / "answers" / "x.csv")
    make_folder(tmp_path / "b")  # holds something already
    with pytest.warns(DataWarning, match=r"left out what glsim wrote: .*pictures, .*answers, .*empty, .*runs$"):
        images = read_data(tmp_path, test_fraction=0)["train"]
    assert as_pairs(images, tmp_path) == [("a/1.jpg", "a"), ("b/1.jpg", "b")]
    with pytest.warns(DataWarning, match="left out what glsim wrote"):
        assert find_images(tmp_path) == list(images.paths)
    assert find_images(tmp_path / "**" / "*.jpg") == list(images.paths)
    assert find_images(tmp_path / "runs" / "one") == [tmp_path / "runs" / "one" / "sheet.jpg"]  # asked for by name


def test_what_the_verbs_write_into_a_data_folder_is_no_class(run_folder, birds, tmp_path, capsys):
    shutil.copytree(birds / "train", tmp_path / "flat")
    flat, image = tmp_path / "flat", str(next((birds / "test").rglob("*.jpg")))
    names = sorted(path.name for path in flat.iterdir())
    for words in (
        ["explain", run_folder, image, "--out", flat / "deep" / "pictures"],
        ["eval", run_folder, "--data", birds, "--out", flat / "results", "--errors", flat / "errors", "--workers", "0"],
        ["predict", run_folder, image, "--out", flat / "answers" / "a.csv", "--format", "csv", "--workers", "0"],
    ):
        assert cli.main(list(map(str, words))) == 0, capsys.readouterr().err
    shutil.copytree(run_folder, flat / "run")
    make_folder(flat / "index")
    assert (run_folder / ".glsim").is_file()  # a run's folder is marked by train
    with pytest.warns(DataWarning, match="left out what glsim wrote: .*answers, .*deep, .*errors, .*index, .*results"):
        assert list(read_data(flat)["train"].classes) == names
    before = sorted(flat.rglob("*"))
    assert cli.main(["explain", str(run_folder), image, "--out", str(flat / names[0])]) == 2
    assert f"out={flat / names[0]} holds images that glsim did not write" in capsys.readouterr().err
    assert sorted(flat.rglob("*")) == before
    words = ["eval", str(run_folder), "--data", str(flat), "--split", "all", "--workers", "0", "--json"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    (note,) = json.loads(said.out)["notes"]
    assert "left out what glsim wrote" in note and said.err.count(note) == 1 and "DataWarning" not in said.err


def test_train_needs_the_splits_that_it_is_asked_for(tmp_path):
    data = str(touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg"))
    with pytest.raises(DataError, match=r"has no split 'test'; it has: train"):
        components.read_splits(Train(data=data, out="-", test=True))
    with pytest.raises(DataError, match=r"has no split 'val'; .* of classes that have two or more"):
        components.read_splits(Train(data=data, out="-", val_fraction=0.2))


def test_class_outside_train_is_named(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg", "test/wolf/1.jpg")
    with pytest.raises(
        DataError, match=r"test.wolf: class 'wolf' is not one of the 2 classes of the train split: a, b"
    ):
        read_data(tmp_path)


@pytest.mark.parametrize("top", ["train/", ""])
def test_empty_class_folder(tmp_path, top):
    touch(tmp_path, f"{top}a/1.jpg", f"{top}b/readme.txt")
    with pytest.raises(DataError, match=r"b: no image to train class 'b' on"):
        read_data(tmp_path)


def test_split_folder_without_classes(tmp_path):
    with pytest.raises(DataError, match=r"test: no images in class folders; what works: a folder train/CLASS/x\.jpg"):
        read_data(touch(tmp_path, "train/a/1.jpg", "test/1.jpg"))


@pytest.mark.parametrize("names", [(), ("x.jpg",), ("a/notes.txt",)])
def test_folder_without_images(tmp_path, names):
    with pytest.raises(DataError, match=r"no images in class folders; what works: .*CSV file"):
        read_data(touch(tmp_path, *names))


def test_missing_source(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: does not exist; what works: .*train\.csv"):
        read_data(tmp_path / "nowhere")


def test_class_folders_are_split_by_hash(tmp_path):
    touch(tmp_path, *[f"{c}/{i:03}.jpg" for c, n in {"a": 50, "b": 11, "c": 2, "d": 1}.items() for i in range(n)])
    splits = read_data(tmp_path, seed=3)
    count = {split: np.bincount(images.labels, minlength=4).tolist() for split, images in splits.items()}
    assert count == {"train": [40, 9, 1, 1], "test": [10, 2, 1, 0]}
    assert not set(splits["train"].paths) & set(splits["test"].paths)
    assert read_data(tmp_path, seed=3) == splits != read_data(tmp_path, seed=4)
    # The rule of the documentation, written out.
    ranked = sorted(range(50), key=lambda i: hashlib.sha256(f"3:a/{i:03}.jpg".encode()).hexdigest())
    expected = {f"a/{i:03}.jpg" for i in ranked[:10]}
    assert {p for p, c in as_pairs(splits["test"], tmp_path) if c == "a"} == expected

    before = set(splits["test"].paths)
    after = set(read_data(touch(tmp_path, "a/new.jpg"), seed=3)["test"].paths)
    assert len(before ^ after) <= 2


def test_test_fraction(tmp_path):
    touch(tmp_path, "x/1.jpg", "x/2.jpg", "x/3.jpg", "y/1.jpg")
    assert list(read_data(tmp_path, test_fraction=0)) == ["train"]
    assert len(read_data(tmp_path, test_fraction=0.9)["train"]) == 2  # the last image of a class stays
    with pytest.raises(ConfigError, match=r"at least 0 and less than 1, got 1\.5"):
        read_data(tmp_path, test_fraction=1.5)


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "real/1.jpg", "real/2.jpg", "data/b/1.jpg")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real", target_is_directory=True)
    images = read_data(tmp_path / "data", test_fraction=0)["train"]
    assert as_pairs(images, tmp_path / "data") == [("a/1.jpg", "a"), ("a/2.jpg", "a"), ("b/1.jpg", "b")]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folder(tmp_path):
    touch(tmp_path, "a/x/1.jpg", "a/2.jpg")
    (tmp_path / "a" / "x").chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        read_data(tmp_path)
    (tmp_path / "a" / "x").chmod(0o700)


# --- CSV lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_splits(tmp_path, delimiter):
    touch(tmp_path, "img/1.jpg", "img/2.jpg", "img/3.jpg", "far.png")
    rows = [
        ("Label", "PATH", "split", "note"),
        ("7", "img/1.jpg", "train", "x"),
        (),
        ("10", "./img/2.jpg", "Train", ""),
        ("", "", "", ""),
        ("7", "img\\3.jpg", "VALID", ""),
        (" 10 ", str(tmp_path / "far.png"), "test"),
    ]
    file = tmp_path / "list.csv"
    file.write_bytes("\r\n".join(delimiter.join(row) for row in rows).encode("utf-8-sig"))
    splits = read_data(file)
    assert splits["train"].classes == ("10", "7")  # names, sorted as text
    assert as_pairs(splits["train"], tmp_path) == [("img/1.jpg", "7"), ("img/2.jpg", "10")]
    assert as_pairs(splits["val"], tmp_path) == [("img/3.jpg", "7")]
    assert as_pairs(splits["test"], tmp_path) == [("far.png", "10")]


def test_csv_quotes_and_unicode(tmp_path):
    touch(tmp_path, "a, b/größe.jpg")
    file = write(tmp_path / "list.csv", "path,label,split", '"a, b/größe.jpg","Fink, grün",train')
    assert as_pairs(read_data(file)["train"], tmp_path) == [("a, b/größe.jpg", "Fink, grün")]


def test_csv_without_splits_is_split_as_the_folder_is(tmp_path):
    names = [f"{c}/{i}.jpg" for c in "ab" for i in range(10)]
    touch(tmp_path, *names)
    by_folder = read_data(tmp_path, seed=5)
    by_list = read_data(write(tmp_path / "list.csv", "path,label", *[f"{name},{name[0]}" for name in names]), seed=5)
    assert by_list == by_folder


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,label", "1.jpg,a"], r"list\.csv: the first line must name the columns path,label or dir,class_id"),
        ([""], r"list\.csv: the first line must name the columns"),
        (["path,label"], r"list\.csv: no rows below the header"),
        (["", "path,label", "", "1.jpg,"], r"list\.csv, line 4: empty label; every row needs path and label"),
        (["path,label", "1.jpg"], r"list\.csv, line 2: empty label"),
        (["path,label", ",a"], r"list\.csv, line 2: empty path"),
        (["path,label", "1.jpg,a,b"], r"list\.csv, line 2: 3 values for 2 columns; quote"),
        (["path,label,split", "1.jpg,a,train", "2.jpg,a,new"], r"line 3: unknown split 'new'; use train, val or test"),
        (["path,label,split", "1.jpg,a"], r"list\.csv, line 2: unknown split ''"),
        (["dir,class_id", "1.jpg,cat"], r"list\.csv, line 2: class_id must be an integer, got 'cat'"),
        (["path,label", "1.jpg,a", "1.jpg,b"], r"line 3: 1\.jpg is class 'b' .*class 'a' .*line 2; an image belongs"),
        (["path,label,split", "1.jpg,a,train", "1.jpg,a,test"], r"line 3: 1\.jpg .*'test' here.*'train' at .*line 2"),
        (["path,label,split", "1.jpg,a,train", "2.jpg,b,val"], r"line 3: class 'b' is not one of the 1 classes"),
    ],
)  # fmt: skip
def test_csv_errors(tmp_path, lines, message):
    touch(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises(DataError, match=message):
        read_data(write(tmp_path / "list.csv", *lines))


def test_csv_missing_images(tmp_path):
    touch(tmp_path, "0.jpg")
    file = write(tmp_path / "list.csv", "path,label", *[f"{i}.jpg,a" for i in range(8)])
    with pytest.raises(DataError, match=r"list\.csv: 7 of 8 images are missing below") as error:
        read_data(file)
    assert str(error.value).count("\n") == 5 and "list.csv, line 3: 1.jpg" in str(error.value)


def test_csv_that_is_no_text(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: not readable as a CSV file in UTF-8 .*what works"):
        read_data(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\n1.jpg,é\n".encode("utf-16"), r"in UTF-8 \(it is in UTF-16\); what works: save it as UTF-8"),
        (
            "path,label\n1.jpg,é\n".encode("utf-16-le"),
            r"\(it holds zero bytes, as UTF-16 and files of no text do\); what works: save",
        ),
        (
            "path,label\n1.jpg,café\n".encode("cp1252"),
            r"\(byte 0xe9 behind '1\.jpg,caf' is of another encoding\); what",
        ),
        (b"path,label,path\n1.jpg,a,2.jpg\n", r"the column path comes twice in the first line"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, content, message):
    touch(tmp_path, "1.jpg")
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_data(tmp_path / "list.csv")
    assert str(error.value).startswith(f"{tmp_path / 'list.csv'}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["path;label\n1.jpg;a\n", "sep=;\nPATH;Label\n1.jpg;a\n", "path,label\r1.jpg,a\r"])
def test_lists_as_spreadsheets_write_them(tmp_path, text):
    touch(tmp_path, "1.jpg")
    (tmp_path / "list.csv").write_text(text, newline="")
    assert as_pairs(read_data(tmp_path / "list.csv")["train"], tmp_path) == [("1.jpg", "a")]


@pytest.mark.parametrize("spelling", ["./img/1.jpg", "img/../img/1.jpg", "{root}/img/1.jpg", "link/1.jpg"])
def test_one_image_by_two_spellings(tmp_path, spelling):
    touch(tmp_path, "img/1.jpg", *[f"{i}.jpg" for i in range(9)])
    (tmp_path / "link").symlink_to(tmp_path / "img", target_is_directory=True)
    other = spelling.format(root=tmp_path)
    for first, second in (("a,train", "a,test"), ("a,train", "b,train")):
        file = write(tmp_path / "list.csv", "path,label,split", f"img/1.jpg,{first}", f"{other},{second}")
        with pytest.raises(DataError, match="line 3: .*1.jpg is class .*; an image belongs to one class and one split"):
            read_data(file)
    others = [f"{i}.jpg,a" for i in range(9)]
    drawn = read_data(
        write(tmp_path / "list.csv", "path,label", "img/1.jpg,a", f"{other},a", *others), test_fraction=0.5
    )
    where = [split for split, images in drawn.items() for path in images.paths if path.parent != tmp_path]
    assert len(where) == 2 and len(set(where)) == 1


def test_a_list_in_the_way_of_folders(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "test/a/1.jpg")
    write(tmp_path / "train.csv", "id,breed", "1,a")
    with pytest.raises(DataError, match=r"train\.csv: the first line must name .*\nor move train\.csv away: the folders beside \(test, train\)"):  # fmt: skip
        read_data(tmp_path)


# --- names of classes -------------------------------------------------------------------------------------------------

COMPOSED, SEPARATE = "caf\u00e9 noir", " cafe\u0301\u00a0noir\u200b"


def test_a_class_has_one_name_however_it_is_spelt(tmp_path):
    touch(
        tmp_path,
        f"f/train/{COMPOSED}/1.jpg",
        f"f/train/{SEPARATE}/2.jpg",
        f"f/test/{SEPARATE}/3.jpg",
        "f/train/b/1.jpg",
    )
    with pytest.warns(DataWarning, match=r"' cafe\\u0301\\xa0noir\\u200b', 'caf\\xe9 noir' are read as one class"):
        splits = read_data(tmp_path / "f")
    assert splits["train"].classes == ("b", COMPOSED) and splits["train"].labels == (1, 0, 1)
    assert splits["test"].labels == (1,)
    lines = [f"f/train/b/1.jpg,{SEPARATE},train", f"f/test/{SEPARATE}/3.jpg,{COMPOSED},test"]
    with pytest.warns(DataWarning, match="are read as one class"):
        assert read_data(write(tmp_path / "list.csv", "path,label,split", *lines))["train"].classes == (COMPOSED,)
    model = ("z", "cafe\u0301 noir", "b")  # an older bundle may have separate accents; its names stay as they are
    with pytest.warns(DataWarning, match="are read as one class"):
        images = read_data(tmp_path / "f", classes=model)["test"]
    assert images.classes == model and images.labels == (1,)
    with pytest.raises(DataError, match="are two classes of the model, but one name in two spellings"):
        read_data(tmp_path / "f" / "test", classes=[COMPOSED, SEPARATE])
    with pytest.raises(DataError, match=r"the class has an empty name, '\\u3000'"):
        read_data(touch(tmp_path / "g", "\u3000/1.jpg", "a/1.jpg"))


# --- published lists --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "data/", "images/", "car_ims/"])
def test_published_lists(tmp_path, below):
    touch(tmp_path, *[f"{below}{i}.jpg" for i in range(8)])
    write(tmp_path / "train.csv", "dir,class_id", "0.jpg,10", "1.jpg,2", "2.jpg,7")
    write(tmp_path / "val.csv", "dir,class_id", "3.jpg,7")
    write(tmp_path / "test.csv", "dir,class_id", "4.jpg,2", "5.jpg,10")
    splits = read_data(tmp_path)
    assert list(splits) == list(SPLITS)
    assert splits["train"].classes == splits["test"].classes == ("2", "7", "10")
    assert as_pairs(splits["train"], tmp_path) == [
        (f"{below}0.jpg", "10"),
        (f"{below}1.jpg", "2"),
        (f"{below}2.jpg", "7"),
    ]

    write(tmp_path / "classid_classname.csv", "class_id,class_name", "2,zebra", "7,yak", "10,ant", "11,unused")
    assert read_data(tmp_path)["test"].classes == ("zebra", "yak", "ant")  # the order of the ids, not of the names
    assert read_data(tmp_path)["test"].labels == (0, 2)

    write(tmp_path / "train_val.csv", "dir,class_id", "0.jpg,10", "1.jpg,2", "2.jpg,7", "3.jpg,7")
    splits = read_data(tmp_path)  # now that is the train split, as the field has it, and val, a part of it, is left out
    assert {split: len(images) for split, images in splits.items()} == {"train": 4, "test": 2}
    assert list(read_data(tmp_path / "test.csv")) == ["train"]  # a single list is split, here into classes of one image


def test_each_published_list_finds_its_own_base(tmp_path):
    touch(tmp_path, "a/0.jpg", "data/1.jpg")
    write(tmp_path / "train.csv", "dir,class_id", "a/0.jpg,0")
    write(tmp_path / "test.csv", "dir,class_id", "1.jpg,0")
    splits = read_data(tmp_path)
    assert splits["train"].paths + splits["test"].paths == (tmp_path / "a" / "0.jpg", tmp_path / "data" / "1.jpg")


def test_lists_come_before_folders(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg")
    write(tmp_path / "train.csv", "path,label", "train/a/1.jpg,cat", "test/a/1.jpg,dog")
    splits = read_data(tmp_path)
    assert list(splits) == ["train"] and splits["train"].classes == ("cat", "dog")


def test_lists_that_are_not_read_are_named(tmp_path):
    touch(tmp_path, "img/a/1.jpg", "img/b/1.jpg")
    write(tmp_path / "train.csv", "path,label", "img/a/1.jpg,a", "img/b/1.jpg,b")
    write(tmp_path / "boxes.csv", "path,x,y", "img/a/1.jpg,1,1")
    touch(tmp_path, "img/a/2.jpg")
    for name in ("test2.csv", "holdout.csv", "test.txt", "Test.parquet", "my_test.xlsx", "prüfung.csv"):
        write(tmp_path / name, "path,label")
        with pytest.warns(DataWarning, match=f"left out {name}: no list"):
            assert list(read_data(tmp_path, test_fraction=0)) == ["train"]
        (tmp_path / name).unlink()
    for name in ("test.CSV", "Testing.Csv", "test.tsv"):
        write(tmp_path / name, "path\tlabel" if name.endswith("tsv") else "path,label")
        with (tmp_path / name).open("a") as file:
            file.write("img/a/2.jpg\ta\n" if name.endswith("tsv") else "img/a/2.jpg,a\n")
        assert list(read_data(tmp_path)) == ["train", "test"]
        (tmp_path / name).unlink()
    touch(tmp_path, "data/train/a/1.jpg", "data/train/b/1.jpg", "data/test/a/1.jpg", "data/test/b/1.jpg")
    (tmp_path / "train.csv").rename(tmp_path / "data" / "train2.csv")
    with pytest.warns(DataWarning, match="left out train2.csv: no list"):
        assert list(read_data(tmp_path / "data")) == ["train", "test"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1_0,cat"], r"classid_classname\.csv, line 2: class_id must be an integer, got '1_0'"),
        (["9" * 5000 + ",cat"], r"classid_classname\.csv, line 2: class_id must be an integer, got '9+ \.\."),
        (["1,cat"], r"train\.csv, line 3: class_id 2 is not among the 1 of classid_classname\.csv"),
        (["1,cat", "2,cat"], r"classid_classname\.csv, line 3: class_id 2 or class_name 'cat' comes twice"),
        (["one,cat"], r"classid_classname\.csv, line 2: class_id must be an integer, got 'one'"),
    ],
)
def test_published_names_errors(tmp_path, names, message):
    touch(tmp_path, "0.jpg", "1.jpg")
    write(tmp_path / "train.csv", "dir,class_id", "0.jpg,1", "1.jpg,2")
    write(tmp_path / "classid_classname.csv", "class_id,class_name", *names)
    with pytest.raises(DataError, match=message):
        read_data(tmp_path)


def test_names_of_classes_in_a_special_file_are_refused(tmp_path):
    touch(tmp_path, "0.jpg", "1.jpg")
    write(tmp_path / "train.csv", "dir,class_id", "0.jpg,1", "1.jpg,2")
    os.mkfifo(tmp_path / "classid_classname.csv")
    with pytest.raises(DataError, match=r"classid_classname\.csv.* not a regular file"):
        read_data(tmp_path)


def test_published_missing_images_name_both_places(tmp_path):
    touch(tmp_path, "data/0.jpg")
    write(tmp_path / "test.csv", "dir,class_id", "0.jpg,1", "1.jpg,2")
    with pytest.raises(
        DataError, match=r"1 of 2 images are missing below .* and the folders in it; first:\n  .*line 3: 1\.jpg"
    ):
        read_data(tmp_path)


# --- class order, held-out part, hash ---------------------------------------------------------------------------------


def test_given_classes_fix_the_order(tmp_path):
    touch(tmp_path, "test/a/1.jpg", "test/b/1.jpg")
    images = read_data(tmp_path, classes=["c", "b", "a"])["test"]
    assert images.classes == ("c", "b", "a") and images.labels == (2, 1)
    with pytest.raises(
        DataError, match=r"test.a: class 'a' is not one of the 6 classes given .*: b, c, d, e, f, \.\.\."
    ):
        read_data(tmp_path, classes=["b", "c", "d", "e", "f", "g"])
    with pytest.raises(DataError, match=r"not one of the 0 classes"):
        read_data(tmp_path, classes=[])


def test_hold_out(tmp_path):
    touch(tmp_path, *[f"train/{c}/{i}.jpg" for c, n in {"a": 20, "b": 3, "c": 1}.items() for i in range(n)])
    images = read_data(tmp_path)["train"]
    kept, held = hold_out(images, 0.1, seed=0)
    assert np.bincount(kept.labels).tolist() == [18, 2, 1] and np.bincount(held.labels).tolist() == [2, 1]
    assert set(kept.paths) | set(held.paths) == set(images.paths) and len(kept) + len(held) == len(images)
    assert kept.classes == held.classes == images.classes
    assert all(images.labels[images.paths.index(p)] == label for p, label in zip(held.paths, held.labels, strict=True))
    assert hold_out(images, 0.1, seed=0) == (kept, held) != hold_out(images, 0.1, seed=1)
    assert np.bincount(hold_out(images, 0.999, seed=0)[0].labels).tolist() == [1, 1, 1]
    assert hold_out(images, 0, seed=0)[0] == images
    empty = ImageList((), (), ("a",))
    assert hold_out(empty, 0.5, 0) == (empty, empty)

    (tmp_path / "train").rename(tmp_path / "moved")  # the draw does not depend on where the folder lies
    paths = tuple(tmp_path / "moved" / path.relative_to(tmp_path / "train") for path in images.paths)
    moved = ImageList(paths, images.labels, images.classes)
    assert [p.name for p in hold_out(moved, 0.1, seed=0)[1].paths] == [p.name for p in held.paths]


def test_val_is_held_out_where_there_is_something_to_spare(tmp_path):
    few, more = ({"train": read_data(touch(tmp_path / n, *names), test_fraction=0)["train"]} for n, names in (("few", ["a/1.jpg", "b/1.jpg"]), ("more", ["a/1.jpg", "a/2.jpg", "b/1.jpg"])))  # fmt: skip
    assert hold_out_val(few, 0.2, 0) == few and hold_out_val(more, 0.0, 0) == more
    assert {split: len(images) for split, images in hold_out_val(more, 0.2, 0).items()} == {"train": 2, "val": 1}
    own = {**more, "val": few["train"]}
    assert hold_out_val(own, 0.2, 0) == own


def test_split_hash_does_not_depend_on_the_place(tmp_path, monkeypatch):
    names = ["train/a/1.jpg", "train/b/1.jpg", "test/a/2.jpg"]
    one, two = touch(tmp_path / "one", *names), touch(tmp_path / "else" / "two", *reversed(names))
    reference = split_hash(read_data(one), one)
    assert len(reference) == 64 and split_hash(read_data(two), two) == reference
    monkeypatch.chdir(two)
    assert split_hash(read_data("."), ".") == reference
    lines = sorted(["train\ttrain/a/1.jpg\ta", "train\ttrain/b/1.jpg\tb", "test\ttest/a/2.jpg\ta"])
    assert reference == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    file = write(
        two / "list.csv", "path,label,split", "train/a/1.jpg,a,train", "train/b/1.jpg,b,train", "test/a/2.jpg,a,test"
    )
    assert split_hash(read_data(file), file) == reference
    assert split_hash(read_data(touch(one, "test/a/3.jpg")), one) != reference


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux allows file names that are not UTF-8")
def test_odd_file_names(tmp_path):
    touch(tmp_path, os.fsdecode(b"a/\xff.jpg"), "a/gro\u0308sse.jpg", "b/tab\t.jpg", "b/[1].jpg")
    splits = read_data(tmp_path)
    assert len(split_hash(splits, tmp_path)) == 64
    composed = touch(tmp_path / "new", os.fsdecode(b"a/\xff.jpg"), "a/gr\u00f6sse.jpg", "b/tab\t.jpg", "b/[1].jpg")
    assert split_hash(read_data(composed), composed) == split_hash(splits, tmp_path)


# --- images to predict ------------------------------------------------------------------------------------------------


def test_find_images(tmp_path, monkeypatch):
    touch(tmp_path, "b.jpg", "a.PNG", "d/e/f.webp", "d/c.gif", "d/notes.txt", "d/.hidden.jpg", "odd[1].jpg", "list.dat")
    monkeypatch.chdir(tmp_path)

    def names(*inputs: str | Path) -> list[str]:
        return [path.as_posix() for path in find_images(inputs)]

    with pytest.warns(DataWarning, match=r"^d: left out 1 file: 1 \.txt$"):
        assert names("d") == ["d/c.gif", "d/e/f.webp"]
    assert names("b.jpg", "a.PNG", "b.jpg", "./b.jpg", tmp_path / "b.jpg") == ["b.jpg", "a.PNG"]
    with pytest.warns(DataWarning, match=r"left out 2 files: 1 \.dat, 1 \.txt$"):
        assert names("*.jpg", "**/*") == ["b.jpg", "odd[1].jpg", "a.PNG", "d/c.gif", "d/e/f.webp"]
    assert names("**/*.webp") == ["d/e/f.webp"]
    assert names("odd[1].jpg") == ["odd[1].jpg"]
    assert names("list.dat") == ["list.dat"]  # named outright: open_image says what is wrong with it
    assert names(tmp_path / "d" / "*.gif") == [(tmp_path / "d" / "c.gif").as_posix()]
    assert find_images("b.jpg") == [Path("b.jpg")]


@pytest.mark.parametrize("given", ["s3://bucket/x.jpg", "list.csv", "List.PARQUET", "list.tsv"])
def test_lists_and_stores_are_for_another_verb(tmp_path, monkeypatch, given):
    write(tmp_path / "list.csv", "path", "b.jpg")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"which glsim predict bulk takes; wanted images or a folder"):
        find_images(given)


@pytest.mark.parametrize("given", ["nothing.jpg", "*.xyz", "empty"])
def test_find_images_finds_nothing(tmp_path, monkeypatch, given):
    touch(tmp_path, "b.jpg", "empty/notes.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no image found; wanted an image, a folder") as error:
        find_images(["b.jpg", given])
    assert str(error.value).startswith(given)


# --- the data set -----------------------------------------------------------------------------------------------------


def to_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((4, 4)))


def collate(items: list) -> tuple:
    bad = [item for item in items if isinstance(item, BadImage)]
    good = [item for item in items if not isinstance(item, BadImage)]
    return [image.shape for image, _ in good], [label for _, label in good], bad


@pytest.fixture
def damaged(tmp_path) -> ImageList:
    for i in range(6):
        scene(seed=i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "3.jpg").write_bytes(b"")
    return ImageList(tuple(tmp_path / f"{i}.jpg" for i in range(6)), (0, 1, 0, 1, 0, 1), ("a", "b"))


def test_dataset(damaged):
    data = ImageDataset(damaged, to_array)
    assert len(data) == 6 and data[1][0].shape == (4, 4, 3) and data[1][1] == 1
    with pytest.raises(BadImage, match=r"3\.jpg: empty file"):
        data[3]
    with pytest.raises(IndexError):
        data[6]
    bare = ImageDataset([str(path) for path in damaged.paths], to_array, keep_bad=True)
    assert bare[0][1] == -1 and isinstance(bare[3], BadImage) and bare[3].__traceback__ is None

    def broken(image: Image.Image) -> None:
        raise BadImage("x", "raised by the transform")

    assert str(ImageDataset(damaged, broken, keep_bad=True)[0]) == "x: raised by the transform"
    with pytest.raises(BadImage, match="raised by the transform"):
        ImageDataset(damaged, broken)[0]


def test_dataset_in_a_data_loader(damaged):
    torch_data = pytest.importorskip("torch.utils.data")
    loader = torch_data.DataLoader(
        ImageDataset(damaged, to_array, keep_bad=True), batch_size=2, num_workers=2, collate_fn=collate
    )
    batches = list(loader)
    assert [len(shapes) for shapes, _, _ in batches] == [2, 1, 2]
    assert [labels for _, labels, _ in batches] == [[0, 1], [0], [0, 1]]
    (bad,) = batches[1][2]
    assert (bad.path, bad.reason) == (damaged.paths[3], "empty file (0 bytes)")

    strict = torch_data.DataLoader(ImageDataset(damaged, to_array), batch_size=2, num_workers=2, collate_fn=collate)
    batches = iter(strict)
    with pytest.raises(BadImage, match=r"3\.jpg: empty file \(0 bytes\)"):  # not RuntimeError, though torch rebuilds it
        list(batches)
    list(batches)  # to the end, so that torch ends its workers now; left to garbage collection that takes 10 seconds


@pytest.mark.skipif(not FLOWERS.is_dir(), reason=f"the real images are not here: {FLOWERS}")
def test_real_images():
    splits = read_data(FLOWERS)
    assert {split: len(images) for split, images in splits.items()} == {"train": 720, "test": 240}
    assert len(splits["train"].classes) == 12 and set(np.bincount(splits["train"].labels)) == {60}
    assert find_bad(splits["test"].paths[::60], workers=2) == []


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero")], ids=["fifo", "device"])
def test_a_list_that_is_no_regular_file_is_refused(tmp_path, make):
    make(tmp_path / "list.csv")
    with pytest.raises(DataError, match="list.csv: not a regular file; what works"):
        read_data(tmp_path / "list.csv")
