"""Boxes as examples: names of regions, files of boxes as columns, matched images, splits and labels, damaged files."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, needs, scene, write
from PIL import Image

from glsim.data import images
from glsim.data.boxed import read_boxed
from glsim.data.detections import find_boxes, find_examples, read_detections
from glsim.data.image_files import find_images
from glsim.data.images import BadImage, by_file, find_bad, read_image, read_regions, taken_at
from glsim.data.readers import hold_out
from glsim.data.regions import Region, cut_of, file_of, split_region, stem_of
from glsim.files import json_parts
from glsim.types import DataError, DataWarning

SIZE = 40, 30


def detection(box, conf=0.9, category="1", **more):
    return {"category": category, "conf": conf, "bbox": box, **more}


MEGADETECTOR = {
    "info": {"format_version": "1.5", "detector": "md_v5a.0.0.pt"},
    "detection_categories": {"1": "animal", "2": "person"},
    "images": [
        {
            "file": "cam1/y.jpg",
            "detections": [
                detection([0.1, 0.2, 0.3, 0.4]),
                detection([0.1, 0.2, 0.0, 0.4]),  # empty
                detection([0.5, 0.5, 0.6, 0.6], 0.8),  # reaches outside
                detection([0.0, 0.0, 1.0, 1.0], 0.7, "2"),
                detection([0.0, 0.0, 1.0, 1.0], 0.7, "9"),  # of no category: no detection
            ],
        },
        {"file": "cam1\\x.jpg", "detections": [detection([0.25, 0.5, 0.5, 0.25], 0.05)]},
        {"file": "cam1/w.jpg", "failure": "Failure image access", "detections": None},
        {"file": "cam2/x.jpg", "detections": []},
    ],
}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for number, name in enumerate(["cam1/x.jpg", "cam1/y.jpg", "cam2/x.jpg"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scene(SIZE, number).save(folder / name, quality=95)
    return folder


def megadetector(tmp_path, content=MEGADETECTOR):
    return write(tmp_path / "md.json", json.dumps(content))


# --- regions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "name", "view"),
    [
        (Region(10, 5, 20, 25), "#xywh=10,5,10,20", (10, 5, 20, 25)),
        (Region(0.25, 0.5, 0.75, 1.25, True), "#xywh=percent:25,50,50,75", (10, 15, 30, 30)),
        (Region(10, 5, 20, 25, False, 0.1), "#xywh=10,5,10,20&margin=0.1", (9, 3, 21, 27)),
        (Region(10, 5, 20, 25, False, 0.0, True), "#xywh=10,5,10,20&square", (5, 5, 25, 25)),
        (Region(0, 0, 4, 20, False, 0.1, True), "#xywh=0,0,4,20&margin=0.1&square", (0, 0, 24, 24)),  # moved inside
        (Region(0, 10, 40, 12, False, 0.0, True), "#xywh=0,10,40,2&square", (0, 0, 40, 30)),  # the image is no higher
        (Region(10.2, 5.5, 10.4, 5.6), "#xywh=10.2,5.5,0.2,0.1", (10, 5, 11, 6)),
        (Region(-9, -9, 5, 99), "#xywh=-9,-9,14,108", (0, 0, 5, 30)),
    ],
)
def test_a_region_has_a_name_and_pixels(region, name, view):
    assert region.fragment == name and region.view(SIZE) == view
    file, again = split_region(f"a#b/x.y.jpg{name}")
    assert file == "a#b/x.y.jpg" and again == pytest.approx(region)


def test_names_that_are_no_regions_are_files():
    for name in ("x.jpg", "x.jpg#xywh=1,2,3", "x.jpg#xywh=1,2,3,4,5", "x.jpg#xywh=1.2.3,2,3,4", "#xywh=1,2,3,4"):
        assert split_region(name) == (name, None) and file_of(name) == name
    assert stem_of(Path("a/x.jpg#xywh=percent:10.5,20,30,40&square")) == "x_10.5_20_40.5_60"


def test_a_region_is_opened_wherever_an_image_is(photos):
    file = photos / "cam1" / "x.jpg"
    whole = read_image(file, np.asarray)
    name = f"{file}#xywh=10,5,20,15"
    assert find_images(name) and np.array_equal(read_image(name, np.asarray), whole[5:20, 10:30])
    cut = read_image(f"{name}&margin=0.5", cut_of)
    assert (cut.whole, cut.view, cut.box, cut.size) == (SIZE, (0, 0, 40, 28), (10, 5, 30, 20), (40, 28))
    assert read_image(file, cut_of) == (SIZE, (0, 0, 40, 30), None)
    with pytest.raises(BadImage, match=r"x.jpg#xywh=50,5,2,2: the box lies outside of 40 x 30 pixels"):
        read_image(f"{file}#xywh=50,5,2,2", np.asarray)


def test_regions_are_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # shown turned by a quarter: 30 x 40 upright
    exif[36867] = "2024:05:06 07:08:09"
    exif[36881] = "+02:00"
    scene(SIZE).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(f"{tmp_path / 'x.jpg'}#xywh=0,30,30,10", cut_of)[:2] == ((30, 40), (0, 30, 30, 40))
    assert taken_at(tmp_path / "y.jpg") is None


def test_the_time_of_an_image_is_that_of_its_exif(tmp_path):
    exif = Image.Exif()
    exif[306] = "2024:01:02 03:04:05"
    scene(SIZE).save(tmp_path / "changed.jpg", exif=exif)
    inner = exif.get_ifd(0x8769)
    inner[36867], inner[36881] = "2023:05:06 07:08:09", "+02:00"
    scene(SIZE).save(tmp_path / "taken.jpg", exif=exif)
    assert taken_at(tmp_path / "changed.jpg") == "2024-01-02T03:04:05"
    assert taken_at(f"{tmp_path / 'taken.jpg'}#xywh=1,1,2,2") == "2023-05-06T07:08:09+02:00"
    inner[36867] = "no time"
    scene(SIZE).save(tmp_path / "odd.jpg", exif=exif)
    assert taken_at(tmp_path / "odd.jpg") is None


def test_regions_of_a_file_are_decoded_once(photos, monkeypatch):
    file, decoded, load = photos / "cam1" / "x.jpg", [], images.to_rgb
    monkeypatch.setattr(images, "to_rgb", lambda image: decoded.append(1) or load(image))
    names = [f"{file}#xywh={box}" for box in ("1,2,3,4", "90,0,3,3", "5,5,0,9", "0,0,9,9")]
    sizes = read_regions(names, lambda image: image.size)
    assert sizes[0] == (3, 4) and sizes[3] == (9, 9) and decoded == [1]
    assert [str(bad).rpartition(": ")[2] for bad in sizes[1:3]] == [
        "the box lies outside of 40 x 30 pixels",
        "the box is empty or turned round",
    ]
    assert [str(bad.path) for bad in find_bad([*names, photos / "cam1" / "gone.jpg"])] == [
        *names[1:3],
        str(photos / "cam1" / "gone.jpg"),
    ]
    assert [len(group) for group in by_file([*names, file, f"{photos}/y.jpg#xywh=1,1,2,2"])] == [5, 1]
    gone = read_regions([f"{photos}/gone.jpg#xywh=1,1,2,2"] * 2, lambda image: image.size)
    assert all(isinstance(bad, BadImage) and "No such file" in bad.reason for bad in gone)


# --- files of boxes ---------------------------------------------------------------------------------------------------


def write_csv(top, shares):
    wide, high = (1, 1) if shares else SIZE
    rows = [
        [key, left * wide, upper * high, right * wide, lower * high, conf, name]
        for key, left, upper, right, lower, conf, name in [
            ("cam1/y.jpg", 0.1, 0.2, 0.4, 0.6, 0.9, "animal"),
            ("cam1/y.jpg", 0.1, 0.2, 0.1, 0.6, 0.9, "animal"),
            ("cam1/y.jpg", 0.5, 0.5, 1.1, 1.1, 0.8, "animal"),
            ("cam1/y.jpg", 0.0, 0.0, 1.0, 1.0, 0.7, "person"),
            ("cam1/x.jpg", 0.25, 0.5, 0.75, 0.75, 0.05, "animal"),
        ]
    ]
    return write(
        top / "boxes.csv",
        "path,left,top,right,bottom,confidence,category",
        *(",".join(map(str, row)) for row in rows),
    )


def write_coco(top):
    names = ["cam1/y.jpg", "cam1/x.jpg"]
    marks = [
        (0, 1, [4, 6, 12, 12], 0.9),
        (0, 1, [4, 6, 0, 12], 0.9),
        (0, 1, [20, 15, 24, 18], 0.8),
        (0, 2, [0, 0, 40, 30], 0.7),
        (1, 1, [10, 15, 20, 7.5], 0.05),
    ]
    content = {
        "annotations": [  # before the images that they name
            {"id": i, "image_id": image, "category_id": kind, "bbox": box, "score": score}
            for i, (image, kind, box, score) in enumerate(marks)
        ],
        "images": [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)],
        "categories": [{"id": 1, "name": "animal"}, {"id": 2, "name": "person"}],
    }
    return write(top / "coco.json", json.dumps(content))


FORMATS = {
    "megadetector": (megadetector, "images[0].detections[1]: box 0.1,0.2,0.1,0.6"),
    "coco": (write_coco, "annotations[1]: box 4,6,4,18"),
    "pixels": (lambda top: write_csv(top, False), "line 3: box 4,6,4,18"),
    "shares": (lambda top: write_csv(top, True), "line 3: box 0.1,0.2,0.1,0.6"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_regions(kind, photos, tmp_path):
    writer, empty = FORMATS[kind]
    file = writer(tmp_path)
    with pytest.warns(DataWarning) as told:
        paths = find_examples([str(photos)], {"boxes": file, "min_confidence": 0.1, "categories": ["animal"]})
    assert [str(w.message).removeprefix(f"{file}: ") for w in told] == [
        f"left out 1 of 5 boxes: {empty} is empty or turned round",
        f"no box of 2 of 3 images, as {photos / 'cam1' / 'x.jpg'}",
    ]
    assert [read_image(path, cut_of).view for path in paths] == [(2, 4, 18, 20), (18, 13, 40, 30)]
    assert {file_of(path) for path in paths} == {photos / "cam1" / "y.jpg"}
    assert [paths.boxes.confidence_of(row) for row in (0, 1)] == [0.9, 0.8]
    assert paths.boxes.category_of(1) == "animal"
    assert paths.boxes.where(1).startswith(f"{file}, ") and len(paths[1:]) == 1 and paths[1:][0] == paths[1]


def test_boxes_are_ordered_by_image_whatever_their_order_in_the_file(photos, tmp_path):
    rows = [(name, n) for n in range(3) for name in ("cam2/x.jpg", "cam1/x.jpg", "gone.jpg")]
    lines = [f"{name},{n},0,{n + 5},9" for name, n in rows]
    file = write(tmp_path / "b.csv", "path,left,top,right,bottom", *lines)
    paths = find_boxes(find_images(photos / "cam[12]" / "x.jpg"), {"boxes": file, "margin": 0.0})
    names = [f"{photos / cam / 'x.jpg'}#xywh={n},0,5,9" for cam in ("cam1", "cam2") for n in range(3)]
    assert list(map(str, paths)) == names and paths.boxes.record[:, 0].tolist() == [3, 6, 9, 2, 5, 8]
    assert paths.image.tolist() == [0, 0, 0, 1, 1, 1]


def edited(**changes):
    content = json.loads(json.dumps(MEGADETECTOR))
    content["images"][0]["detections"][1] |= changes
    return json.dumps(content)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.json", edited(bbox=[1, 2, 3]), r"m.json, images\[0\].detections\[1\]: wanted the numbers x,y,width,height"),
        ("m.json", edited(conf="high"), r"m.json, images\[0\].detections\[1\]: wanted the numbers conf, got \['high'"),
        ("m.json", edited(bbox=None), r"images\[0\].detections\[1\]: wanted the numbers x"),
        ("m.json", '{"images": [{"file": "x", "detections": [{"conf": 1}]}]}', r"m.json, images\[0\]: not as MegaDet"),
        ("m.json", '{"images": [{"file": "x", "detections": 3}]}', r"m.json, images\[0\]: not as MegaDetector"),
        ("m.json", '{"images": [{"file": "x", "detections": []}]}', r"m.json: no box in it; wanted a CSV file"),
        ("m.json", json.dumps(MEGADETECTOR)[:-9], "m.json is damaged or cannot be read: "),
        ("m.json", json.dumps(MEGADETECTOR).replace("0.25", "NaN"), "m.json is damaged .*: NaN is no JSON"),
        ("b.csv", "path,left,top,right,bottom,conf\nx,0,0,9,9,sure", "b.csv, line 2: wanted the numbers confidence"),
    ],
)
def test_damaged_records_are_named(name, text, said, tmp_path):
    with pytest.raises(DataError, match=said):
        read_detections(write(tmp_path / name, text))


def test_what_leaves_nothing_is_said(photos, tmp_path):
    file = megadetector(tmp_path)
    with pytest.raises(DataError, match="no box is of category 'bird'; its categories are: animal, person"):
        read_detections(file, categories=["bird"])
    with pytest.raises(DataError, match="none of its 5 boxes is left with min_confidence=0.99, categories=all"):
        read_detections(file, 0.99)
    said = r"md.json: no box of any of the 1 images: .*cam2.x.jpg, ends in what it has"
    with pytest.warns(DataWarning), pytest.raises(DataError, match=said):
        find_boxes([photos / "cam2" / "x.jpg"], {"boxes": file})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            '{"a": [1, {"b": []}], "c": [2], "d": "]}"}',
            [("a", 0, 1), ("a", 1, {"b": []}), ("c", -1, [2]), ("d", -1, "]}")],
        ),
        (' {\n"a" : [ ] , "c":{}}\n', [("c", -1, {})]),
        ("{}", []),
        ('{"a": 3}', [("a", -1, 3)]),
    ],
)
def test_json_is_read_part_by_part(text, parts, tmp_path):
    assert list(json_parts(write(tmp_path / "x.json", text), {"a"})) == parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"a" 1}',
        '{"a": [1 2]}',
        '{"a": [1,',
        '{"a": [1,]}',
        '{"a": 1',
        '{"a": [1e999]}',
        '{"a": [' + "[" * 99,
    ],
)
def test_json_that_is_none_is_one_sentence(text, tmp_path):
    with pytest.raises(DataError, match="x.json is damaged or cannot be read: ") as raised:
        list(json_parts(write(tmp_path / "x.json", text), {"a"}))
    assert "\n" not in str(raised.value)


# --- data sets --------------------------------------------------------------------------------------------------------


def boxes_of(folder, file, labels):
    """Two boxes in every image; labels, where there are some, by turns."""
    lines = [
        f"{path.relative_to(folder).as_posix()},{n},2,{n + 20},22" + (f",{labels[n % len(labels)]}" if labels else "")
        for path in sorted(folder.glob("*/**/*.jpg"))
        for n in range(2)
    ]
    return write(file, "path,left,top,right,bottom" + (",label" if labels else ""), *lines)


def test_boxes_without_labels_have_those_of_their_images(birds, tmp_path):
    folder = birds / "train"
    file = boxes_of(birds, tmp_path / "b.csv", [])
    splits = read_boxed(birds, {"boxes": file, "margin": 0.0})
    assert {name: len(images) for name, images in splits.items()} == {"train": 36, "test": 18}
    train = splits["train"]
    assert train.labels[:4] == (0, 0, 0, 0) and train.labels.count(2) == 12 and not train.drawn
    assert all(file_of(p).parent.name == train.classes[y] for p, y in zip(train.paths, train.labels, strict=True))
    assert str(train.paths[1]).endswith("#xywh=1,2,20,20") and file_of(train.paths[1]).is_relative_to(folder)
    kept, held = hold_out(train, 0.2, 0)
    assert (len(kept), len(held)) == (30, 6) and type(kept.paths) is type(train.paths)
    assert not {file_of(path) for path in kept.paths} & {file_of(path) for path in held.paths}


def test_boxes_with_labels_make_the_classes_and_an_image_is_in_one_split(photos, tmp_path):
    file = boxes_of(photos, tmp_path / "b.csv", ["owl", "crow"])
    splits = read_boxed(photos, {"boxes": file}, test_fraction=0.4)
    assert splits["train"].classes == ("crow", "owl") and splits["train"].drawn
    assert sorted(splits["train"].labels) == [0, 0, 1, 1] and sorted(splits["test"].labels) == [0, 1]
    assert not {file_of(p) for p in splits["train"].paths} & {file_of(p) for p in splits["test"].paths}
    (photos / "cam1").rename(photos / "train")
    (photos / "cam2").rename(photos / "val")
    file = boxes_of(photos, tmp_path / "b.csv", ["owl", "crow"])
    told = read_boxed(photos, {"boxes": file})
    assert {name: len(images) for name, images in told.items()} == {"train": 4, "val": 2} and not told["val"].drawn
    with pytest.raises(DataError, match=r"b.csv, line 2: class 'owl' is not one of the 1 classes given .*: crow"):
        read_boxed(photos, {"boxes": file}, classes=["crow"])
    text = file.read_text().replace(",owl", ",", 1)
    file.write_text(text)
    with pytest.raises(DataError, match="b.csv, line 2: no label, but others have one"):
        read_boxed(photos, {"boxes": file})


@needs(SHARED / "data" / "cub20")
def test_boxes_of_real_birds_are_their_birds():
    data = SHARED / "data" / "cub20"
    with pytest.warns(DataWarning, match="left out parts.csv"):
        splits = read_boxed(data, {"boxes": data / "boxes.csv", "margin": 0.0, "square": True})
    assert {name: len(images) for name, images in splits.items()} == {"train": 600, "test": 585}
    cut = read_image(splits["test"].paths[0], cut_of)
    assert cut.box == (50, 46, 426, 319) and cut.view == (50, 0, 426, 320)  # it is 320 high
