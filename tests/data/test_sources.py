"""Shards and Hugging Face data sets: the same images, labels and splits as the folder they were made from."""

import gzip
import io
import json
import os
import shutil
import sys
import tarfile

import numpy as np
import pytest
from conftest import TINY, scene, touch
from safetensors.torch import load_file

from glsim import ConfigError, DataError
from glsim.data import audit, hugging_face
from glsim.data.hugging_face import write_out
from glsim.data.image_files import find_images
from glsim.data.images import BadImage, find_bad, open_image
from glsim.data.loaders import ImageDataset
from glsim.data.readers import hold_out, read_data, split_hash
from glsim.data.sources import parse
from glsim.evaluation import evaluate
from glsim.training import train
from glsim.training.config import Train
from glsim.types import DataWarning


def picture(seed=0, kind="PNG"):
    file = io.BytesIO()
    scene((24, 16), seed).save(file, kind)
    return file.getvalue()


def shard(path, files):
    """A tar archive with `files`: name -> content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(*labels, start=0, **more):
    """Files of samples 0000, 0001, .. with those labels."""
    files = {}
    for i, label in enumerate(labels, start):
        files |= {f"{i:04d}.cls": label, f"{i:04d}.png": picture(i)}
    return files | more


def as_rows(splits):
    return {
        split: [(path.name, images.classes[label]) for path, label in zip(images.paths, images.labels, strict=True)]
        for split, images in splits.items()
    }


# --- WebDataset -------------------------------------------------------------------------------------------------------


def test_shards_are_read_where_they_are(tmp_path):
    shard(tmp_path / "train-000.tar", samples("wren", "tit"))
    shard(tmp_path / "train-001.tar", samples("wren", start=2))
    shard(tmp_path / "birds-validation-0.tar", samples("tit", start=3))
    shard(tmp_path / "test" / "0.tar", {"./deep/er/0004.JPG": picture(4, "JPEG"), "./deep/er/0004.cls": "tit\n"})
    splits = read_data(f"wds:{tmp_path}")
    assert as_rows(splits) == {
        "train": [("0000.png", "wren"), ("0001.png", "tit"), ("0002.png", "wren")],
        "val": [("0003.png", "tit")],
        "test": [("0004.JPG", "tit")],
    }
    assert splits["train"].paths[2] == tmp_path / "train-001.tar" / "0002.png" and not splits["train"].drawn
    for i in (2, 0, 1):  # at random, not as a stream
        seen, label = ImageDataset(splits["train"], np.asarray)[i]
        assert np.array_equal(seen, np.asarray(scene((24, 16), i))) and label == [1, 0, 1][i]
    assert open_image(splits["test"].paths[0]).size == (24, 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["birds-validation-0.tar", "test", "train-000.tar", "train-001.tar"]  # fmt: skip


def test_labels_from_json_and_names_of_numbers(tmp_path):
    about = {"label": 1, "species": "owl", "caption": "an owl"}
    files = {"a.webp": picture(1, "WEBP"), "a.json": json.dumps(about), "a.seg.png": picture(2), "a.txt": "an owl"}
    shard(tmp_path / "train.tar", files | {"notes.txt": "no image belongs to this"})
    with pytest.warns(DataWarning, match=r"left out, as no image belongs to them, 1 file: 1 \.txt"):
        assert as_rows(read_data(f"wds:{tmp_path}", test_fraction=0)) == {"train": [("a.webp", "1")]}
    shard(tmp_path / "train.tar", files)
    assert as_rows(read_data(f"wds:{tmp_path}:label=species")) == {"train": [("a.webp", "owl")]}
    (tmp_path / "classnames.txt").write_text("wren\nbarn owl\n")
    assert as_rows(read_data(f"wds:{tmp_path}")) == {"train": [("a.webp", "barn owl")]}
    with pytest.raises(
        DataError, match=r"a\.webp: label 'owl' is not the number of a line of .*classnames\.txt, from 0"
    ):
        read_data(f"wds:{tmp_path}:label=species")


def test_names_of_numbers_are_lines_and_each_its_own(tmp_path):
    shard(tmp_path / "train.tar", samples("0", "2"))
    names = tmp_path / "classnames.txt"
    names.write_text("dai\u2028sy\niris\x0c\x85\r\npansy\n", encoding="utf-8", newline="")
    assert read_data(f"wds:{tmp_path}", test_fraction=0)["train"].classes == ("dai sy", "pansy")
    names.write_text("daisy\niris\ni\u200bris\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"classnames\.txt: 'iris' comes twice"):
        read_data(f"wds:{tmp_path}")
    shard(tmp_path / "train.tar", samples("9" * 5000))
    names.write_text("daisy\n")
    with pytest.raises(DataError, match=r"label '9+ \.\. .*is not the number of a line"):
        read_data(f"wds:{tmp_path}")
    names.unlink()
    os.mkfifo(names)
    with pytest.raises(DataError, match="cannot be read as text"):
        read_data(f"wds:{tmp_path}")


@pytest.mark.parametrize(
    "names",
    [
        ("holdout", "rest"),
        ("fold1", "fold2"),
        ("lernen", "pruefung"),
        ("gallery", "query"),
        ("learn-0", "check-0"),
        ("split1", "split2"),
        ("seen", "unseen"),
        ("Testdaten", "Trainingsdaten"),
    ],
)
def test_shards_that_may_be_splits_are_refused(tmp_path, names):
    for name in names:
        shard(tmp_path / f"{name}.tar", samples("wren", "tit"))
    with pytest.raises(DataError, match="may be meant as that of a split"):
        read_data(f"wds:{tmp_path}")


def test_shards_of_several_names_are_read_as_one_and_said_to_be(tmp_path):
    for i, name in enumerate(("apprendre-0", "verifier-0")):
        shard(tmp_path / f"{name}.tar", samples("wren", "tit", start=2 * i))
    with pytest.warns(
        DataWarning, match=r"no archive has the name of a split \(apprendre, verifier\): all are read as"
    ):
        assert len(read_data(f"wds:{tmp_path}", test_fraction=0)["train"]) == 4


def test_archives_that_are_no_shards_are_counted(tmp_path):
    for name in ("train-0.tar", "train-1.TAR"):
        shard(tmp_path / name, samples("wren", start=int(name[6])))
    (tmp_path / "train-2.tar.gz").write_bytes(b"x")
    (tmp_path / "train-3.tgz").write_bytes(b"x")
    os.mkfifo(tmp_path / "train-4.tar")
    with pytest.warns(DataWarning, match=r"left out 3 files that are no plain tar archives, as train-2\.tar\.gz"):
        assert len(read_data(f"wds:{tmp_path}")["train"]) == 2


def test_shards_without_splits_are_drawn_from(tmp_path):
    shard(tmp_path / "a" / "0.tar", samples(*"xy" * 10))
    splits = read_data(f"wds:{tmp_path / 'a'}", seed=3)
    assert {s: len(images) for s, images in splits.items()} == {"train": 16, "test": 4}
    assert read_data(f"wds:{tmp_path / 'a'}")["train"].drawn
    drawn = split_hash(splits, f"wds:{tmp_path / 'a'}")
    shutil.move(tmp_path / "a", tmp_path / "b")  # another place, the same split
    assert split_hash(read_data(f"wds:{tmp_path / 'b'}", seed=3), f"wds:{tmp_path / 'b'}") == drawn
    assert split_hash(read_data(f"wds:{tmp_path / 'b'}", seed=4), f"wds:{tmp_path / 'b'}") != drawn
    kept, held = hold_out(read_data(f"wds:{tmp_path / 'b'}", test_fraction=0)["train"], 0.5, 0)
    assert len(kept) == len(held) == 10


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no .tar file in the folder .*train-000.tar"),
        ({"train-0.tar": {"a.txt": "x"}}, r"train-0\.tar: no image in it"),
        ({"train-0.tar": {"a.png": picture()}}, r"label of sample a: no \.cls or \.json beside the image"),
        ({"train-0.tar": {"a.png": picture(), "a.cls": " "}}, "label of sample a: it is empty"),
        ({"train-0.tar": {"a.png": picture(), "a.json": "[1]"}}, r"'label' in a\.json should be a text or a number, got None"),
        ({"train-0.tar": {"a.png": picture(), "a.json": '{"label": [1]}'}}, r"got \[1\]"),
        ({"train-0.tar": {"a.png": picture(), "a.json": "{"}}, "label of sample a: Expecting"),
        ({"train-0.tar": {"a.png": picture(), "a.cls": b"\xff\xfe\xfd"}}, "label of sample a: 'utf-8' codec"),
        ({"train-0.tar": samples("x", **{"0000.jpg": picture()})}, r"sample 0000 has several images: 0000\.png, 0000\.jpg"),
        ({"train-0.tar": samples("x"), "1.tar": samples("x")}, r"1\.tar: train, val or test should be a word in its name"),
        ({"train/test-0.tar": samples("x")}, "is it test or train"),
        ({"Trainingsdaten-0.tar": samples("x")}, "its name may be meant as that of a split; known are train, training"),
        ({"trainval-0.tar": samples("x"), "val-0.tar": samples("x")}, r"val-0\.tar: by its name a part of .*trainval-0"),
        ({"train-0.tar": samples("x"), "test-0.tar": samples("y")}, r"test-0\.tar.0000\.png: class 'y' is not one of the 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_shards(tmp_path, files, message):
    for name, content in files.items():
        shard(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read_data(f"wds:{tmp_path}")


@pytest.mark.parametrize("damage", ["compressed", "in a file", "in a header", "no end", "two in one", "not a tar"])
def test_damaged_shards_are_refused(tmp_path, damage):
    path = shard(tmp_path / "train-0.tar", samples("x", "y", "x"))
    whole = path.read_bytes()
    last = whole.index(b"0002.png")
    path.write_bytes(
        {
            "compressed": gzip.compress(whole),
            "in a file": whole[: last + 600],
            "in a header": whole[: last + 100],
            "no end": whole[:last],
            "two in one": whole[:last] + b"x" * 512 + whole[last:],
            "not a tar": b"hello" * 1000,
        }[damage]
    )
    with pytest.raises(DataError, match=r"train-0\.tar: damaged, cut off or compressed \(.*; a shard is a plain tar"):
        read_data(f"wds:{tmp_path}")


def test_a_shard_that_was_written_anew_is_read_anew(tmp_path):
    shard(tmp_path / "train-0.tar", samples("x", "x"))
    (first, _) = read_data(f"wds:{tmp_path}")["train"].paths
    assert np.array_equal(open_image(first), scene((24, 16), 0))
    shard(tmp_path / "train-0.tar", {"zero.txt": "moves the rest", **samples("x", "x", "x")})
    assert np.array_equal(open_image(first), scene((24, 16), 0))
    (tmp_path / "train-0.tar").rename(tmp_path / "train-1.tar")
    with pytest.warns(DataWarning, match="no image belongs"):
        assert len(read_data(f"wds:{tmp_path}")["train"]) == 3


@pytest.mark.parametrize(
    ("train", "test"), [("training", "testing"), ("trainset", "test_set"), ("x-trainval", "tests")]
)
def test_shards_know_the_usual_names_of_splits(tmp_path, train, test):
    shard(tmp_path / f"{train}-000.tar", samples("x"))
    shard(tmp_path / "@eaDir" / f"{train}-000.tar", samples("y"))
    shard(tmp_path / test / "0.tar", samples("x") | {"._0000.png": "", "__MACOSX/0001.png": ""})
    assert list(read_data(f"wds:{tmp_path}")) == ["train", "test"]


def test_shards_with_dots_in_names_and_without_images(tmp_path):
    files = {"daisy.v2.jpg": picture(kind="JPEG"), "daisy.v2.cls": "a", "daisy.v3.jpg": picture(kind="JPEG"), "daisy.v3.json": '{"label": "b"}', "rose.big.png": picture(), "rose.cls": "cafe\u0301", "x.svg": "", "x.cls": "a", "y.raw": "", "y.cls": "b", "z": ""}  # fmt: skip
    shard(tmp_path / "train.tar", files)
    with pytest.warns(DataWarning, match=r"no image belongs to them, 3 files: 1 without an ending, 1 \.raw, 1 \.svg"):
        rows = as_rows(read_data(f"wds:{tmp_path}"))
    assert rows == {"train": [("daisy.v2.jpg", "a"), ("daisy.v3.jpg", "b"), ("rose.big.png", "caf\u00e9")]}


def test_bad_images_in_shards_have_names(tmp_path):
    path = shard(tmp_path / "train-0.tar", samples("x", "y", **{"9.jpg": b"", "9.cls": "x", "8.png": picture()[:99], "8.cls": "y"}))  # fmt: skip
    bad = find_bad(read_data(f"wds:{tmp_path}")["train"].paths)
    assert [(b.path, b.reason.partition(":")[0]) for b in bad] == [
        (path / "9.jpg", "empty file (0 bytes)"),
        (path / "8.png", "truncated"),
    ]
    for missing in (path / "7.png", tmp_path / "none.tar" / "7.png"):
        with pytest.raises(BadImage, match=r"7\.png: cannot be read: No such file"):
            open_image(missing)
    assert find_images([path / "8.png", str(path / "0000.png")]) == [path / "8.png", path / "0000.png"]
    with pytest.raises(DataError, match="no image found"):
        find_images(path / "7.png")


@pytest.fixture(scope="session")
def bird_shards(birds, tmp_path_factory):
    """The birds in shards of 5, in the order of the folder."""
    folder = tmp_path_factory.mktemp("shards")
    for split, images in read_data(birds).items():
        for n in range(0, len(images), 5):
            files = {}
            for i in range(n, min(n + 5, len(images))):
                files[f"{i:06d}.cls"] = images.classes[images.labels[i]]
                files[f"{i:06d}{images.paths[i].suffix}"] = images.paths[i].read_bytes()
            shard(folder / f"{split}-{n:03d}.tar", files)
    return f"wds:{folder}"


def test_shards_train_the_model_that_their_folder_trains(birds, bird_shards, run_folder, tmp_path):
    train.train(Train(data=bird_shards, out=str(tmp_path / "run"), **TINY), progress=False)
    ours, theirs = (load_file(run / "model.safetensors") for run in (tmp_path / "run", run_folder))
    assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)
    by_folder = evaluate.evaluate_bundle(run_folder, birds, workers=0)
    by_shards = evaluate.evaluate_bundle(run_folder, bird_shards, workers=2, out=tmp_path / "e")
    for key in ("count", "correct", "per_class", "split_drawn"):
        assert getattr(by_shards, key) == getattr(by_folder, key)
    rows = (tmp_path / "e" / "predictions.csv").read_text().splitlines()
    assert rows[1].startswith(f"{bird_shards[4:]}/test-000.tar/000000.jpg,")
    found = audit.audit_images(audit.list_images(bird_shards), image_size=(224, 224), workers=0)
    assert found.counts == {"train": 18, "test": 9} and found.sizes.formats == {"JPEG": 27}
    assert not [f for f in found.findings if f.check == "unreadable"]


# --- how a source is written ------------------------------------------------------------------------------------------


def test_sources_are_taken_apart(tmp_path):
    assert parse("flowers") is parse(tmp_path) is parse("hf") is parse("C:/data") is None
    assert parse("hf:owner/name") == ("hf", "owner/name", {})
    assert parse("hf:owner/name:tiny") == ("hf", "owner/name", {"config": "tiny"})
    options = {"config": "tiny", "label": "fine", "image": "photo"}
    assert parse("hf:owner/name:tiny,label=fine,image=photo") == ("hf", "owner/name", options)
    assert parse("hf:owner/name:label=fine") == ("hf", "owner/name", {"label": "fine"})
    odd = tmp_path / "a:b"
    odd.mkdir()
    assert parse(f"wds:{odd}") == ("wds", str(odd), {})


@pytest.mark.parametrize("source", ["hf:a/b:labels=x", "hf:a/b:label=", "hf:a/b:x,y", "wds:a:tiny", "wds:a:image=x"])
def test_options_that_are_not_there(source):
    with pytest.raises(ConfigError, match="cannot read .*; options of (hf: config, image, label|wds: label)$"):
        read_data(source)


def test_the_library_is_only_needed_for_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    write_out.cache_clear()
    with pytest.raises(ConfigError, match=r"needs the library datasets .*: pip install 'glsim\[hf\]'"):
        read_data(f"hf:{tmp_path}")
    shard(tmp_path / "train.tar", samples("x", "y"))
    assert len(read_data(f"wds:{tmp_path}", test_fraction=0)["train"]) == 2


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hf(tmp_path, monkeypatch):
    """The library, with a cache of its own."""
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_out.cache_clear()
    yield datasets
    write_out.cache_clear()


NAMES = ["zebra finch", "ant, red", "wren"]


def table(hf, labels, kind="PNG", label="label", **more):
    """A table of images with those labels."""
    feature = hf.ClassLabel(names=NAMES) if all(v is None or isinstance(v, int) for v in labels) else hf.Value("string")
    columns = {"image": [{"bytes": picture(i, kind), "path": None} for i in range(len(labels))], label: labels}
    features = {"image": hf.Image(), label: feature}
    for name, (kind, values) in more.items():
        columns[name], features[name] = values, kind
    return hf.Dataset.from_dict(columns, features=hf.Features(features))


def save(hf, folder, **splits):
    hf.DatasetDict(splits).save_to_disk(folder)
    return f"hf:{folder}"


def test_a_saved_data_set(hf, tmp_path):
    name = save(hf, tmp_path / "d", train=table(hf, [0, 1, 2, 0]), validation=table(hf, [2]), test=table(hf, [1, 0], "JPEG"))  # fmt: skip
    splits = read_data(name)
    assert as_rows(splits) == {
        "train": [("000000.png", NAMES[0]), ("000001.png", NAMES[1]), ("000002.png", NAMES[2]), ("000003.png", NAMES[0])],
        "val": [("000000.png", NAMES[2])],
        "test": [("000000.jpg", NAMES[1]), ("000001.jpg", NAMES[0])],
    }  # fmt: skip
    assert splits["train"].classes == tuple(sorted(NAMES)) and not splits["train"].drawn
    for i, path in enumerate(splits["test"].paths):
        assert path.read_bytes() == picture(i, "JPEG")  # nothing is coded anew
    assert split_hash(splits, name) == split_hash(splits, splits["train"].paths[0].parents[1])


def test_it_is_written_once_for_each_version(hf, tmp_path, monkeypatch):
    name = save(hf, tmp_path / "d", train=table(hf, [0, 1, 2, 0]), test=table(hf, [1]))
    folder = read_data(name)["train"].paths[0].parents[1]
    assert folder.parent == tmp_path / "cache" / "glsim" and folder.name.startswith("d-")
    (folder / "mark").touch()
    write_out.cache_clear()
    assert read_data(name)["train"].paths[0].parents[1] == folder and (folder / "mark").exists()

    shutil.rmtree(tmp_path / "d")
    save(hf, tmp_path / "d", train=table(hf, [2, 1, 2, 0]), test=table(hf, [1]))
    write_out.cache_clear()
    content = hugging_face._content

    def breaks(name, split, i, stored):
        if i == 2:
            raise KeyboardInterrupt
        return content(name, split, i, stored)

    monkeypatch.setattr(hugging_face, "_content", breaks)
    with pytest.raises(KeyboardInterrupt):
        read_data(name)
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]
    monkeypatch.undo()
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    again = read_data(name)["train"]
    assert again.paths[0].parents[1] != folder and again.classes[again.labels[0]] == "wren"


def test_files_that_the_library_reads(hf, tmp_path):
    (tmp_path / "p" / "data").mkdir(parents=True)
    table(hf, [0, 1, 2, 0]).to_parquet(tmp_path / "p" / "data" / "train-00000-of-00001.parquet")
    table(hf, [1]).to_parquet(tmp_path / "p" / "data" / "test-00000-of-00001.parquet")
    splits = read_data(f"hf:{tmp_path / 'p'}")
    assert {s: len(images) for s, images in splits.items()} == {"train": 4, "test": 1}
    assert splits["test"].paths[0].read_bytes() == picture(0)

    for split, label, i in (("train", "a", 0), ("train", "b", 1), ("test", "b", 2)):
        target = tmp_path / "f" / split / label / f"{i}.png"
        target.parent.mkdir(parents=True)
        target.write_bytes(picture(i))
    found, folders = read_data(f"hf:{tmp_path / 'f'}"), read_data(tmp_path / "f")
    for split in ("train", "test"):
        assert (found[split].labels, found[split].classes) == (folders[split].labels, folders[split].classes)
        assert [p.read_bytes() for p in found[split].paths] == [p.read_bytes() for p in folders[split].paths]


def test_files_that_the_library_would_leave_out_are_not_lost(hf, tmp_path):
    for label in ("bed", "sofa"):
        (tmp_path / "f" / label).mkdir(parents=True)
        for i in range(4):
            name = f"train_{label}_{i}.png" if i == 0 else f"{label}_{i}.png"
            (tmp_path / "f" / label / name).write_bytes(picture(i))
    with pytest.raises(DataError, match=r"reads 2 of 8 files, and not bed/bed_1\.png: it goes by the words of splits .*; what works: --data"):  # fmt: skip
        read_data(f"hf:{tmp_path / 'f'}")
    for path in (tmp_path / "f").rglob("train_*"):
        path.rename(path.with_name(path.name.removeprefix("train_")))
    write_out.cache_clear()
    assert sum(map(len, read_data(f"hf:{tmp_path / 'f'}").values())) == 8


def test_one_split_and_splits_that_are_left_out(hf, tmp_path):
    table(hf, [0, 1] * 5).save_to_disk(tmp_path / "one")
    assert {s: len(i) for s, i in read_data(f"hf:{tmp_path / 'one'}").items()} == {"train": 8, "test": 2}
    assert read_data(f"hf:{tmp_path / 'one'}")["train"].drawn
    secret = save(hf, tmp_path / "secret", train=table(hf, [0, 1] * 5), test=table(hf, [-1, -1]), extra=table(hf, [0]))
    with pytest.warns(DataWarning) as told:
        assert {s: len(i) for s, i in read_data(secret).items()} == {"train": 8, "test": 2}
    assert [str(w.message).partition(": ")[2] for w in told] == ["left out, as no known split: extra (1 images)", "left out, as without labels: test"]  # fmt: skip
    only = save(hf, tmp_path / "only", test=table(hf, [0, 1]))
    assert {s: len(i) for s, i in read_data(only).items()} == {"test": 2}


def test_columns_are_found_or_named(hf, tmp_path):
    coarse = (hf.ClassLabel(names=["bird", "insect"]), [0, 1, 0])
    text = (hf.Value("string"), ["x", "y", "x"])
    number = (hf.Value("int64"), [10, 9, 10])
    name = save(hf, tmp_path / "d", train=table(hf, [0, 1, 2], label="fine", coarse=coarse, text=text, number=number))
    with pytest.raises(ConfigError, match=r"several columns could be the label: fine, coarse; name one, as hf:.*:label=COLUMN; columns: image, fine"):  # fmt: skip
        read_data(name)
    for column, labels in (("fine", NAMES), ("coarse", ["bird", "insect", "bird"]), ("text", list("xyx")), ("number", ["10", "9", "10"])):  # fmt: skip
        images = read_data(f"{name}:label={column}", test_fraction=0)["train"]
        assert [images.classes[y] for y in images.labels] == labels
    with pytest.raises(ConfigError, match="no column 'species'; there are: image, fine, coarse, text, number"):
        read_data(f"{name}:label=species")
    with pytest.raises(ConfigError, match="no column is marked as label"):
        read_data(save(hf, tmp_path / "t", train=table(hf, ["x", "y"])))
    second = (hf.Image(), [{"bytes": picture(9), "path": None}] * 2)
    two = save(hf, tmp_path / "two", train=table(hf, [0, 1], second=second))
    with pytest.raises(ConfigError, match="several columns could be the image: image, second"):
        read_data(two)
    images = read_data(f"{two}:image=second", test_fraction=0)["train"]
    assert images.paths[0].read_bytes() == picture(9)


def test_what_is_wrong_with_a_data_set(hf, tmp_path):
    for splits, message in (
        ({"train": table(hf, [0, None, 1])}, "image 1 of train has no label in column 'label'"),
        ({"train": table(hf, [-1, -1])}, "no image has a label in column 'label'"),
        ({"a": table(hf, [0]), "b": table(hf, [1])}, "wanted one split each called train, validation, test; there are: a, b"),
        ({"val": table(hf, [0]), "valid": table(hf, [0])}, "wanted one split each"),
    ):  # fmt: skip
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        with pytest.raises(DataError, match=message):
            read_data(save(hf, tmp_path / "d", **splits))
        write_out.cache_clear()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name != "glsim"]


def test_damaged_images_are_left_to_be_named(hf, tmp_path):
    broken = {"image": [{"bytes": picture()[:99], "path": None}, {"bytes": b"nothing", "path": None}], "label": [0, 1]}
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=NAMES)})
    images = read_data(save(hf, tmp_path / "d", train=hf.Dataset.from_dict(broken, features=features)), test_fraction=0)
    assert [b.reason.partition(":")[0] for b in find_bad(images["train"].paths)] == [
        "truncated",
        "not an image, or damaged at its start",
    ]


def test_a_data_set_that_is_not_there(hf, tmp_path):
    with pytest.raises(DataError, match="hf:nobody/nothing could not be loaded .*; without a network, only what was loaded before can be had") as e:  # fmt: skip
        read_data("hf:nobody/nothing")
    assert "\n" not in str(e.value)
    touch(tmp_path / "empty", "notes.txt")
    with pytest.raises(DataError, match="could not be loaded .*; is it whole?"):
        read_data(f"hf:{tmp_path / 'empty'}")


def test_eval_takes_a_hugging_face_data_set(hf, birds, run_folder, tmp_path):
    splits = {}
    for split, images in read_data(birds).items():
        columns = {"image": [str(path) for path in images.paths], "label": list(images.labels)}
        features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list(images.classes))})
        splits[split] = hf.Dataset.from_dict(columns, features=features)
    name = save(hf, tmp_path / "birds", **splits)
    ours = evaluate.evaluate_bundle(run_folder, name, workers=0)
    theirs = evaluate.evaluate_bundle(run_folder, birds, workers=0)
    assert ours.per_class == theirs.per_class and ours.correct_top5 == theirs.correct_top5
