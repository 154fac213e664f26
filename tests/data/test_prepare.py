"""Named data sets: a tiny replica of every publisher's layout becomes our list, and what is not right is said."""

import csv
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
from conftest import ROOT, TINY, choices, scene, touch, write
from PIL import Image

from glsim import cli
from glsim.cli.eval import Options as EvalOptions
from glsim.data import catalog, prepare
from glsim.data.catalog import SETS
from glsim.data.readers import read_data
from glsim.files import document
from glsim.training.config import Train
from glsim.types import ConfigError, DataError

VOC = "<annotation>{}</annotation>"
OBJECT = "<object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def mat(file, **values):
    """A .mat file; lists of text become cells, lists of dicts an array of structs."""
    io = pytest.importorskip("scipy.io", reason="scipy writes and reads .mat files")
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        if isinstance(value[0], str):
            values[name] = np.array(value, dtype=object).reshape(-1, 1)
        elif isinstance(value[0], dict):
            kinds = [(key, object) for key in value[0]]
            values[name] = np.array([tuple(row.values()) for row in value], dtype=kinds).reshape(1, -1)
    io.savemat(file, values)


def birds(top, names):
    touch(top, "images/1.A/x_1.jpg", "images/1.A/x_2.jpg", "images/2.B/y_1.jpg", "images/2.B/y_2.jpg")
    ids = ["a-1", "a-2", "b-1", "b-2"]
    images = ["1.A/x_1.jpg", "1.A/x_2.jpg", "2.B/y_1.jpg", "2.B/y_2.jpg"]
    write(top / "images.txt", *map(" ".join, zip(ids, images, strict=True)))
    write(top / "classes.txt", *names)
    write(top / "image_class_labels.txt", *map(" ".join, zip(ids, "1122", strict=True)))
    write(top / "train_test_split.txt", *map(" ".join, zip(ids, "1010", strict=True)))
    write(top / "bounding_boxes.txt", *[f"{i} 60.0 27.0 325.0 304.0" for i in ids])


def make_cub(top):
    birds(top / "CUB_200_2011", ["1 001.Black_footed_Albatross", "2 002.Laysan_Albatross"])
    touch(top / "segmentations", "1.A/x_1.png", "2.B/y_2.png")


def make_nabirds(top):
    birds(top, ["0 Birds", "1 Ross's Goose", "2 Snow Goose (White, adult)"])


def make_dogs(top):
    names = [f"n02085620-Chihuahua/n02085620_{i}.jpg" for i in (1, 2)] + [f"n1-Shih-Tzu/n1_{i}.jpg" for i in (3, 4)]
    touch(top / "Images", *names)
    for split, of in (("train", names[::2]), ("test", names[1::2])):
        mat(top / "lists" / f"{split}_list.mat", file_list=of, labels=np.array([[1], [2]]))
    for name in names:
        write(top / "Annotation" / name[:-4], VOC.format(OBJECT.format(5, 6, 70, 80) + OBJECT.format(1, 9, 20, 90)))


def make_flowers(top):
    touch(top / "flowers-102" / "jpg", *[f"image_{i:05d}.jpg" for i in range(1, 7)])
    mat(top / "flowers-102" / "imagelabels.mat", labels=np.array([[1, 102, 1, 102, 1, 102]], dtype=np.uint8))
    numbers = {"trnid": [1], "valid": [2], "tstid": [6, 5, 4, 3]}
    mat(top / "flowers-102" / "setid.mat", **{name: np.array([value]) for name, value in numbers.items()})


def make_pets(top):
    top /= "oxford-iiit-pet"
    names = ["Abyssinian_1", "Abyssinian_2", "american_bulldog_1", "american_bulldog_2"]
    touch(top, *[f"images/{n}.jpg" for n in names], *[f"annotations/trimaps/{n}.png" for n in names])
    write(top / "annotations" / "list.txt", "#Image CLASS-ID SPECIES BREED ID")
    write(top / "annotations" / "trainval.txt", f"{names[0]} 1 1 1", f"{names[2]} 2 2 1")
    write(top / "annotations" / "test.txt", f"{names[1]} 1 1 1", f"{names[3]} 2 2 1")
    write(top / "annotations" / "xmls" / f"{names[0]}.xml", VOC.format(OBJECT.format(333, 72, 425, 158)))


def make_aircraft(top):
    top = top / "fgvc-aircraft-2013b" / "data"
    touch(top / "images", "0000001.jpg", "0000002.jpg", "0000003.jpg", "0000004.jpg")
    write(top / "images_variant_trainval.txt", "0000001 F-16A/B", "0000002 Boeing 737-700")
    write(top / "images_variant_test.txt", "0000003 F-16A/B", "0000004 Boeing 737-700")
    write(top / "images_box.txt", *[f"000000{i} 1 2 30 40" for i in range(1, 5)])


def cars(names, **more):
    return [{**n, "bbox_x1": 30, "bbox_y1": 52, "bbox_x2": 246, "bbox_y2": 147, **more} for n in names]


def make_cars(top):
    touch(top, *[f"cars_{split}/cars_{split}/0000{i}.jpg" for split in ("train", "test") for i in (1, 2)])
    mat(top / "devkit" / "cars_meta.mat", class_names=["AM General Hummer SUV 2000", "smart fortwo"])
    rows = cars([{"fname": f"0000{i}.jpg", "class": i} for i in (1, 2)])
    mat(top / "devkit" / "cars_train_annos.mat", annotations=rows)
    mat(top / "cars_test_annos_withlabels.mat", annotations=rows)


def make_cars_whole(top):
    touch(top, *[f"car_ims/00000{i}.jpg" for i in range(4)])
    rows = [{"relative_im_path": f"car_ims/00000{i}.jpg", "class": 1 + i // 2, "test": i % 2} for i in range(4)]
    names = ["AM General Hummer SUV 2000", "smart fortwo"]
    mat(top / "cars_annos.mat", annotations=cars(rows), class_names=names)


def make_food(top):
    top /= "food-101"
    touch(top / "images", *[f"{c}/{i}.jpg" for c in ("apple_pie", "waffles") for i in (1, 2)])
    for i, split in ((1, "train"), (2, "test")):
        write(top / "meta" / f"{split}.json", json.dumps({c: [f"{c}/{i}"] for c in ("apple_pie", "waffles")}))


def make_inat(top, year, folder):
    categories = [{"id": i, "name": name} for i, name in ((0, "Turdus merula"), (7, "Parus major"))]
    for k, part in enumerate(("train", "val")):
        names = [f"{folder}/Aves/{c['id']}/{part}.jpg" for c in categories]
        touch(top, *names)
        images = [{"id": 10 * k + i, "file_name": name} for i, name in enumerate(names)]
        labels = [{"image_id": 10 * k + i, "category_id": c["id"]} for i, c in enumerate(categories)]
        content = {"images": images, "categories": categories, "annotations": labels[::-1]}
        write(top / f"{part}{year}.json", json.dumps(content))


def make_inat17(top):
    make_inat(top, 2017, "train_val_images")


def make_inat18(top):
    make_inat(top, 2018, "train_val2018")
    names = [{"id": 7, "name": "Corvus corax"}, {"id": 0, "name": "Pica pica"}]
    write(top / "categories.json", json.dumps(names))


def make_inat21(top):
    taxa = ["00000_Animalia_Chordata_Aves_P_T_Turdus_merula", "00001_Animalia_Chordata_Aves_P_P_Parus_major"]
    touch(top, *[f"{part}/{taxon}/{part}.jpg" for part in ("train", "val") for taxon in taxa])
    touch(top, "train/@eaDir/thumb.jpg", f"train/{taxa[0]}/._train.jpg", "__MACOSX/train/x.jpg")  # junk is no taxon


def make_vegfru(top):
    names = ["veg200_images/Chinese_cabbage", "fru92_images/apple"]
    for split in ("train", "val", "test"):
        touch(top, *[f"{name}/{split}.jpg" for name in names])
        write(top / "vegfru_list" / f"vegfru_{split}.txt", *[f"{n}/{split}.jpg {i}" for i, n in enumerate(names)])


def make_lists(top):
    touch(top / "data", "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")
    write(top / "train.csv", "class_id,dir", "0,a/1.jpg", "1,b/1.jpg")
    write(top / "test.csv", "class_id,dir", "0,a/2.jpg", "1,b/2.jpg")
    write(top / "classid_classname.csv", "class_id,class_name", "0,rei", "1,asuka")


BOX = {"cub": "60,27,385,331", "nabirds": "60,27,385,331", "dogs": "1,6,70,90", "aircraft": "0,1,30,40"}
BOX |= {"cars": "30,52,246,147"}
REPLICAS = {  # name: maker, classes, images of train, val, test
    "cub": (make_cub, ["001.Black_footed_Albatross", "002.Laysan_Albatross"], (2, 0, 2)),
    "nabirds": (make_nabirds, ["Ross's Goose", "Snow Goose (White, adult)"], (2, 0, 2)),
    "dogs": (make_dogs, ["Chihuahua", "Shih-Tzu"], (2, 0, 2)),
    "flowers": (make_flowers, ["blackberry lily", "pink primrose"], (2, 0, 4)),
    "pets": (make_pets, ["Abyssinian", "american_bulldog"], (2, 0, 2)),
    "aircraft": (make_aircraft, ["Boeing 737-700", "F-16A/B"], (2, 0, 2)),
    "cars": (make_cars, ["AM General Hummer SUV 2000", "smart fortwo"], (2, 0, 2)),
    "food": (make_food, ["apple_pie", "waffles"], (2, 0, 2)),
    "inat17": (make_inat17, ["Parus major", "Turdus merula"], (2, 0, 2)),
    "inat18": (make_inat18, ["Corvus corax", "Pica pica"], (2, 0, 2)),
    "inat21": (make_inat21, ["Parus major", "Turdus merula"], (2, 0, 2)),
    "vegfru": (make_vegfru, ["Chinese_cabbage", "apple"], (2, 2, 2)),
    **dict.fromkeys(["dafb", "moe", "cotton", "soy"], (make_lists, ["asuka", "rei"], (2, 0, 2))),
}


@pytest.fixture
def small(monkeypatch):
    """The table with the counts of the replicas."""
    for name, (_, classes, counts) in REPLICAS.items():
        there = {split: n for split, n in zip(("train", "val", "test"), counts, strict=True) if n}
        monkeypatch.setitem(SETS, name, dataclasses.replace(SETS[name], classes=len(classes), counts=there))
    return SETS


def table(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


# --- every layout -----------------------------------------------------------------------------------------------------


def test_there_is_a_replica_of_every_set():
    assert set(REPLICAS) == set(SETS) and len(SETS) == 16


@pytest.mark.parametrize("name", REPLICAS)
def test_replica_becomes_a_list(tmp_path, small, name):
    make, classes, counts = REPLICAS[name]
    make(tmp_path / "given")
    done = prepare.prepare_published(name, tmp_path / "root", [tmp_path / "given"])
    rows = table(done.csv)
    splits = read_data(done.csv)
    assert list(splits["train"].classes) == classes
    assert tuple(len(splits.get(split, ())) for split in ("train", "val", "test")) == counts
    assert next(r for r in rows if r["split"] == "train")["path"].startswith("../given/")
    assert all(r["label"] in classes for r in rows)
    boxes = {",".join(r[side] for side in ("left", "top", "right", "bottom")) for r in rows if r.get("left")}
    assert boxes == ({BOX[name]} if name in BOX else {"333,72,425,158"} if name == "pets" else set())
    saved = json.loads((tmp_path / "root" / f"{name}.json").read_text())
    assert saved == json.loads(json.dumps(document(done))) and saved["counts"]["train"] == counts[0]
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == [f"{name}.csv", f"{name}.json"]


def test_cars_in_one_folder(tmp_path, small):
    make_cars_whole(tmp_path)
    done = prepare.prepare_published("cars", tmp_path, [])
    labels = {(row["path"], row["label"], row["split"]) for row in table(done.csv)}
    assert ("car_ims/000001.jpg", "AM General Hummer SUV 2000", "test") in labels and len(labels) == 4


def test_each_image_keeps_its_own_label_split_and_mask(tmp_path, small):
    make_cub(tmp_path)
    rows = table(prepare.prepare_published("cub", tmp_path, []).csv)
    assert [(r["path"][-9:], r["label"][:3], r["split"], r["mask"]) for r in rows] == [
        ("A/x_1.jpg", "001", "train", "segmentations/1.A/x_1.png"),
        ("A/x_2.jpg", "001", "test", ""),
        ("B/y_1.jpg", "002", "train", ""),
        ("B/y_2.jpg", "002", "test", "segmentations/2.B/y_2.png"),
    ]
    make_flowers(tmp_path)
    rows = table(prepare.prepare_published("flowers", tmp_path, []).csv)
    assert {(r["path"][-6:-4], r["label"], r["split"]) for r in rows} == {
        (f"0{i}", "pink primrose" if i % 2 else "blackberry lily", "train" if i < 3 else "test") for i in range(1, 7)
    }
    make_pets(tmp_path)
    rows = table(prepare.prepare_published("pets", tmp_path, []).csv)
    assert [bool(r["left"]) for r in rows] == [True, False, False, False] and all(r["mask"] for r in rows)


def test_classes_that_share_a_name_stay_apart(tmp_path, small):
    birds(tmp_path, ["1 Goose", "2 Goose"])
    rows = table(prepare.prepare_published("nabirds", tmp_path, []).csv)
    assert {row["label"] for row in rows} == {"1 Goose", "2 Goose"}


# --- archives, folders, downloads -------------------------------------------------------------------------------------


def test_archives_and_loose_files_are_unpacked_into_the_root(tmp_path, small):
    make_flowers(tmp_path)
    given = tmp_path / "flowers-102"
    with tarfile.open(tmp_path / "102flowers.tgz", "w:gz") as tar:
        tar.add(given / "jpg", "jpg")
    with zipfile.ZipFile(tmp_path / "labels.zip", "w") as archive:
        archive.write(given / "imagelabels.mat", "imagelabels.mat")
    words = [tmp_path / "102flowers.tgz", tmp_path / "labels.zip", given / "setid.mat"]
    done = prepare.prepare_published("flowers", tmp_path / "root", words)
    assert table(done.csv)[0]["path"] == "jpg/image_00001.jpg"
    by_folder = prepare.prepare_published("flowers", tmp_path / "other", [given])
    assert by_folder.split_hash == done.split_hash  # wherever the images lie


def test_archives_that_are_none(tmp_path, small):
    (tmp_path / "CUB.rar").write_bytes(b"Rar!")
    with tarfile.open(tmp_path / "whole.tgz", "w:gz") as tar:
        scene((300, 300)).save(tmp_path / "x.png")
        tar.add(tmp_path / "x.png", "x.png")
    (tmp_path / "cut.tgz").write_bytes((tmp_path / "whole.tgz").read_bytes()[:2000])
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.add(tmp_path / "x.png", "../outside.png")
    for name, message in [
        ("CUB.rar", r"CUB\.rar: neither tar nor zip; unpack it"),
        ("cut.tgz", r"cut\.tgz: the archive is damaged"),
        ("evil.tar", r"evil\.tar: the archive is damaged .*outside"),
        ("none.tgz", r"none\.tgz: does not exist; --source takes CUB-200-2011's archives"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare.prepare_published("cub", tmp_path / "root", [tmp_path / name])
    assert not (tmp_path / "outside.png").exists()
    with pytest.raises(DataError, match=r"one of 2 sources is a folder"):
        prepare.prepare_published("cub", tmp_path / "root", [tmp_path, tmp_path / "whole.tgz"])


def test_torchvision_downloads_where_it_can(tmp_path, small, monkeypatch):
    asked = []

    def download(root, download):
        asked.append(root)
        sys.stdout.write("100%")
        make_pets(tmp_path / "root")

    monkeypatch.setattr("torchvision.datasets.OxfordIIITPet", download)
    assert cli.main(["datasets", "prepare", "pets", "--root", str(tmp_path / "root"), "--json"]) == 0
    prepare.prepare_published("pets", tmp_path / "root", [])  # the files are there now
    assert asked == [str(tmp_path / "root")]


def test_json_stays_one_document_and_people_hear_what_comes_next(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr(
        "torchvision.datasets.Food101", lambda *_, **__: (sys.stdout.write("100%"), make_food(tmp_path))
    )
    assert cli.main(["datasets", "prepare", "food", "--root", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == 2
    assert cli.main(["datasets", "prepare", "food", "--root", str(tmp_path)]) == 0
    assert "next: glsim train --dataset food --data" in capsys.readouterr().out


def test_no_network_is_one_sentence(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fail)
    for name in (n for n, known in SETS.items() if known.download):
        assert cli.main(["datasets", "prepare", name, "--root", str(tmp_path / name)]) == 3
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "could not be downloaded" in said and SETS[name].homepage in said and "--source PATH" in said
        assert not list((tmp_path / name).glob("*.csv"))


@pytest.mark.parametrize("name", [name for name, known in SETS.items() if not known.download])
def test_what_cannot_be_downloaded_says_where_to_get_it(tmp_path, name):
    with pytest.raises(DataError, match=r"is not there, and no program downloads") as error:
        prepare.prepare_published(name, tmp_path, [])
    assert SETS[name].homepage in str(error.value) and f"prepare {name} --root {tmp_path} --source" in str(error.value)


# --- checks -----------------------------------------------------------------------------------------------------------


def test_counts_are_checked(tmp_path):
    make_cub(tmp_path)
    with pytest.raises(DataError, match=r"got \{'train': 2, 'test': 2\} images, CUB-200-2011 has \{'train': 5994, "):
        prepare.prepare_published("cub", tmp_path, [])
    assert not list(tmp_path.glob("*cub*"))
    make_lists(tmp_path / "moe")
    with pytest.raises(DataError, match=r"moe: got 2 classes, moeImouto faces has 173; --partial"):
        prepare.prepare_published("moe", tmp_path / "moe", [])


def test_missing_images_and_partial(tmp_path, small):
    make_cub(tmp_path)
    (tmp_path / "CUB_200_2011" / "images" / "2.B" / "y_2.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 4 images are missing.*\n.*y_2\.jpg"):
        prepare.prepare_published("cub", tmp_path, [])
    done = prepare.prepare_published("cub", tmp_path, [], partial=True)
    assert done.partial and done.counts == {"train": 2, "test": 1} and len(table(done.csv)) == 3
    empty = tmp_path / "empty"
    birds(empty, ["1 a", "2 b"])
    for image in empty.rglob("*.jpg"):
        image.unlink()
    with pytest.raises(DataError, match=r"none of the images listed is there"):
        prepare.prepare_published("cub", empty, [], partial=True)


def test_split_hash(tmp_path, small, monkeypatch):
    make_nabirds(tmp_path)
    done = prepare.prepare_published("nabirds", tmp_path, [])
    lines = [
        "train\t1.A/x_1.jpg\tRoss's Goose",
        "test\t1.A/x_2.jpg\tRoss's Goose",
        "train\t2.B/y_1.jpg\tSnow Goose (White, adult)",
        "test\t2.B/y_2.jpg\tSnow Goose (White, adult)",
    ]
    assert done.split_hash == hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    known = SETS["nabirds"]
    monkeypatch.setitem(SETS, "nabirds", dataclasses.replace(known, split_hash=done.split_hash))
    prepare.prepare_published("nabirds", tmp_path, [])
    monkeypatch.setitem(SETS, "nabirds", dataclasses.replace(known, split_hash="0" * 64))
    with pytest.raises(DataError, match=r"the split is .*, the publisher's is 0000"):
        prepare.prepare_published("nabirds", tmp_path, [])
    assert json.loads((tmp_path / "nabirds.json").read_text())["split_hash"] == done.split_hash


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("cub", "CUB_200_2011/images.txt", "z-9 1.A/x_1.jpg", r"not laid out as CUB-200-2011's publisher does .*z-9"),
        ("cub", "CUB_200_2011/bounding_boxes.txt", "a-1 left", r"not laid out as CUB-200-2011"),
        ("food", "food-101/meta/test.json", "{", r"test\.json: no JSON"),
        ("pets", "oxford-iiit-pet/annotations/xmls/Abyssinian_1.xml", "<a>", r"Abyssinian_1\.xml: no boxes"),
        ("flowers", "flowers-102/setid.mat", "none", r"setid\.mat: no readable \.mat file"),
        (
            "vegfru",
            "vegfru_list/vegfru_train.txt",
            "images/a/1.jpg 0",
            r"images is not there, nor in the folders in it",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, small, name, file, content, message):
    REPLICAS[name][0](tmp_path)
    write(tmp_path / file, content)
    with pytest.raises(DataError, match=message):
        prepare.prepare_published(name, tmp_path, [])


def test_without_scipy(tmp_path, small, monkeypatch):
    make_flowers(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"setid\.mat: reading \.mat files needs scipy: pip install scipy"):
        prepare.prepare_published("flowers", tmp_path, [])


def test_unknown_names(tmp_path):
    for settings in (Train, EvalOptions):
        words = {"data": "d", "dataset": "owls"} | ({"out": "o"} if settings is Train else {"source": "s"})
        with pytest.raises(ConfigError, match=rf"unknown data ?set 'owls'; {choices(SETS)}"):
            settings(**words)


# --- --dataset NAME ---------------------------------------------------------------------------------------------------


def settings(*words):
    verb = cli.load_verb("train")
    return cli.parse("train", verb.options, ["--data", "d", "--out", "o", *words], verb.recipe)


def test_settings_of_the_set_hold_unless_others_are_given(tmp_path):
    s = settings("--dataset", "dogs")
    assert (s.options, s.resize_ratio, s.mean) == ({"top_o": 16}, 1.34, [0.485, 0.456, 0.406])
    assert settings("--dataset", "dogs", "--method", "ffvt").options == {"top_k": 24}
    assert settings("--dataset", "dogs", "--method", "plain").options == {}
    s = settings("--dataset", "cars", "--options.metric", "gls_l2")
    assert (s.options, s.resize_ratio) == ({"top_o": 8, "metric": "gls_l2"}, 1 / 0.875)
    s = settings("--dataset", "moe", "--std=[0.1,0.2,0.3]")
    assert (s.mean, s.std) == ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3])
    recipe = write(tmp_path / "r.yaml", "dataset: dogs", "options: {top_o: 4}", "resize_ratio: 1.5")
    s = settings("--recipe", str(recipe))
    assert (s.options, s.resize_ratio) == ({"top_o": 4}, 1.5)
    assert settings("--recipe", str(recipe), "--resize-ratio", "1.2").resize_ratio == 1.2
    s = settings()
    assert (s.options, s.resize_ratio, s.mean, s.dataset) == ({}, 1.34, None, None)


def test_unprepared_data_say_how_to_prepare(tmp_path):
    with pytest.raises(DataError, match=r"cub\.csv is not there; make it with: glsim datasets prepare cub --root"):
        catalog.prepared(tmp_path, "cub")
    assert catalog.prepared(tmp_path, None) == tmp_path
    file = write(tmp_path / "mine.csv", "path,label")
    assert catalog.prepared(file, "cub") == file


def test_train_and_eval_by_name(tmp_path, small, birds):
    from glsim.evaluation import evaluate
    from glsim.training import train

    make_cars_whole(tmp_path)
    for i, image in enumerate(sorted((tmp_path / "car_ims").iterdir())):
        Image.open(sorted(birds.rglob("test/*/*.jpg"))[3 * (i // 2)]).save(image)
    prepare.prepare_published("cars", tmp_path, [])
    s = Train(
        dataset="cars",
        data=str(tmp_path),
        out=str(tmp_path / "run"),
        **TINY | {"epochs": 1, "batch_size": 1, "test": True},
    )
    assert train.train(s, progress=False).test.count == 2
    text = (tmp_path / "run" / "train.yaml").read_text()
    assert "dataset: cars" in text and "resize_ratio: 1.142857" in text and "top_o: 4" in text
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"]["top_o"] == 4
    source = str(tmp_path / "run")
    done = evaluate.evaluate_bundle(source, tmp_path, dataset="cars", workers=0)
    assert done.count == 2 and not done.split_drawn
    with pytest.raises(DataError, match=r"prepare dogs"):
        evaluate.evaluate_bundle(source, tmp_path, dataset="dogs", workers=0)


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_catalog_does_not_need_torch():
    code = "import sys, glsim.data.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_list_names_everything(capsys):
    assert cli.main(["datasets"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", text, re.M) for name in ("synthetic", *SETS))
    assert "5994 train, 5794 test" in text and "CC BY-SA 4.0" in text and "counts not stated" in text
    assert cli.main(["datasets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["datasets"]}
    assert rows["dogs"]["defaults"]["options"]["glsim"] == {"top_o": 16} and rows["cub"]["classes"] == 200


def test_the_documented_table_is_the_table():
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    listed = {cells[0].strip("`"): cells[1:] for cells in rows}
    assert set(listed) == set(SETS)
    for name, known in SETS.items():
        counts = " / ".join(f"{n:,}" for n in known.counts.values()) or "not stated"
        ratio = "1/0.875" if known.resize_ratio == 1 / 0.875 else str(known.resize_ratio)
        mean = "0.5" if known.mean == catalog.HALF[0] else "ImageNet"
        how = "download" if known.download else "`--source`"
        title = f"[{known.title}]({known.homepage})"
        numbers = [f"{known.classes:,}", counts, str(known.top_o), ratio, mean, how]
        assert listed[name] == [title, *numbers, known.extras or "-", known.protocol, known.licence], name
