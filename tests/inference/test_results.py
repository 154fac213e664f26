"""Answers of boxes in the files of other tools, only what lives at a place, names of classes, images filed by answer."""

import csv
import json
import re

import numpy as np
import pytest
from conftest import scene, small_model, write
from PIL import Image

import glsim
from glsim.data.annotations import read_annotations
from glsim.data.class_names import read_class_names
from glsim.data.detections import read_detections
from glsim.data.places import read_allowed
from glsim.files import read_json
from glsim.inference.formats import as_text
from glsim.inference.predictor import predict_images
from glsim.inference.results import CAMTRAP_FIELDS, camtrap_fields
from glsim.inference.sorting import sort_into
from glsim.types import ConfigError, DataError, DataWarning

LABELS = ["001.crow", "002.owl", "003.fox", "004.wolf", "005.lynx"]
SIZE = 80, 60


def detection(box, conf, category="1", **more):
    return {"category": category, "conf": conf, "bbox": box, **more}


MEGADETECTOR = {
    "info": {"format_version": "1.4", "detector": "md_v5a.0.0.pt"},
    "detection_categories": {"1": "animal", "2": "person"},
    "classification_categories": {"3": "002.owl", "7": "boar"},
    "images": [
        {"file": "b/y.jpg", "detections": [detection([0.1, 0.2, 0.3, 0.41], 0.926), detection([0, 0, 1, 1], 0.5, "2")]},
        {
            "file": "a/x.jpg",
            "max_detection_conf": 0.81,
            "detections": [
                detection([0.5, 0.5, 0.6, 0.2822], 0.81),
                detection([0.0, 0.1, 0.2, 0.3], 0.061, classifications=[["7", 0.9]]),
            ],
        },
        {"file": "b/empty.jpg", "detections": []},
        {"file": "b/gone.jpg", "failure": "Failure image access", "detections": None},
    ],
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    names = {"001.crow": {"name": "Crow", "scientific_name": "Corvus corone", "taxon_id": "9"}}
    folder = tmp_path_factory.mktemp("bundles") / "glsim"
    return glsim.save(small_model(seed=3), folder, labels=LABELS, class_names=names)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three photographs, one with a time and one with a time and its zone, and the detector's file."""
    folder = tmp_path_factory.mktemp("place")
    for number, name in enumerate(["a/x.jpg", "b/y.jpg", "b/empty.jpg"]):
        exif = Image.Exif()
        exif[306] = f"2024:05:0{number + 1} 07:08:09"
        if number == 1:
            exif.get_ifd(0x8769)[36881] = "+02:00"
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        scene(SIZE, number).save(folder / "photos" / name, exif=exif)
    write(folder / "md.json", json.dumps(MEGADETECTOR))
    return folder


def read_rows(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def answer(bundle, place, **options):
    chosen = {"boxes": place / "md.json", "min_confidence": 0.3, "categories": ["animal"]} | options
    return predict_images(bundle, [str(place / "photos")], workers=0, **chosen)


@pytest.fixture(scope="module")
def answered(bundle, place):
    with pytest.warns(DataWarning, match="no box of 1 of 3 images"):
        return answer(bundle, place).predictions


def test_a_box_is_answered_as_its_picture_is(bundle, place, answered):
    assert [p.path for p in answered] == [str(place / "photos" / name) for name in ("a/x.jpg", "b/y.jpg")]
    x, y = (p.detection for p in answered)
    assert x.box == pytest.approx((40, 30, 80, 46.932)) and x.size == SIZE and x.time == "2024-05-01T07:08:09"
    assert (y.category, y.confidence, y.listed, y.record) == ("animal", 0.926, "b/y.jpg", (0, 0))
    picture = glsim.Predictor(bundle)(Image.open(answered[0].path).crop((36, 28, 80, 49)))[0]
    assert picture.labels == answered[0].labels
    assert picture.probabilities == pytest.approx(answered[0].probabilities, abs=1e-5)
    moved = tuple(side + (36, 28)[i % 2] for i, side in enumerate(picture.box))
    assert moved == answered[0].box  # the crop, in pixels of the image
    assert f"{answered[0].path} [40,30,80,47]: " in as_text(answered)


@pytest.mark.filterwarnings("ignore::glsim.types.DataWarning")
def test_megadetector_keeps_all_that_was_there(bundle, place, answered, tmp_path):
    out = tmp_path / "results.json"
    answer(bundle, place, format="megadetector", out=out)
    result = read_json(out)
    ids = result.pop("classification_categories")
    assert ids["3"] == "002.owl" and ids["7"] == "boar" and set(ids.values()) == {*LABELS, "boar"}
    described = result.pop("classification_category_descriptions")
    assert described.keys() == ids.keys() and "Crow (Corvus corone)" in described.values()
    told = {}
    for number, image in enumerate(result["images"]):
        for i, found in enumerate(image["detections"] or ()):
            if (number, i) != (1, 1):
                told[number, i] = found.pop("classifications", None)
    info = result.pop("info")
    assert info.pop("classifier") == str(bundle) and re.fullmatch(
        r"[\d-]{10} [\d:]{8}", info.pop("classification_completion_time")
    )
    before = json.loads((place / "md.json").read_text())
    del before["classification_categories"]
    assert info == before.pop("info") and result == before
    assert told[0, 1] is None
    for p in answered:
        pairs = told[p.detection.record]
        assert [ids[number] for number, _ in pairs] == list(p.labels)
        assert [share for _, share in pairs] == pytest.approx(p.probabilities, abs=1e-5)
    again, first = read_detections(out), read_detections(place / "md.json")
    assert (again.sides == first.sides).all() and (again.confidence == first.confidence).all()


@pytest.mark.filterwarnings("ignore::glsim.types.DataWarning")
def test_every_file_of_boxes_becomes_every_file_of_results(bundle, place, answered, tmp_path):
    table = tmp_path / "answers.csv"
    answer(bundle, place, out=table)
    rows = read_rows(table)
    assert [row["label"] for row in rows] == [p.labels[0] for p in answered]
    assert [float(row["detector_confidence"]) for row in rows] == [0.81, 0.926] and rows[0]["time"][:4] == "2024"
    again = read_detections(table)  # boxes with labels
    assert again.sides == pytest.approx(np.array([p.detection.box for p in answered])) and again.labelled
    answer(
        bundle, place, boxes=table, min_confidence=0.0, categories=None, format="megadetector", out=tmp_path / "m.json"
    )
    made = read_json(tmp_path / "m.json")["images"]
    assert [image["file"] for image in made] == [p.path for p in answered]
    assert (
        made[0]["detections"][0]["bbox"] == pytest.approx([0.5, 0.5, 0.5, 0.2822])
        and "record" not in made[0]["detections"][0]
    )
    coco = {
        "images": [{"id": "i", "file_name": "a/x.jpg", "width": 80, "height": 60}],
        "categories": [{"id": 4, "name": answered[0].labels[0]}],
        "annotations": [{"image_id": "i", "category_id": 4, "bbox": [40.125, 30, 40, 17]}],
    }
    boxes = write(tmp_path / "coco.json", json.dumps(coco))
    answer(bundle, place, boxes=boxes, min_confidence=0.0, categories=None, format="coco", out=tmp_path / "r.json")
    (found,) = json.loads((tmp_path / "r.json").read_text())
    assert (found["image_id"], found["bbox"]) == ("i", [40.125, 30, 40, 17]) and 0 < found["score"] <= 1
    assert (found["category_id"] == 4) == (found["category_name"] == answered[0].labels[0])
    answer(bundle, place, format="coco", out=tmp_path / "r.json")
    first = json.loads((tmp_path / "r.json").read_text())[0]
    assert first["image_id"] == "a/x.jpg" and first["category_id"] == 1 + LABELS.index(answered[0].labels[0])
    parquet = pytest.importorskip("pyarrow.parquet")
    answer(bundle, place, out=tmp_path / "p.parquet")
    columns = parquet.read_table(tmp_path / "p.parquet").to_pydict()
    assert columns["label"] == [row["label"] for row in rows] and columns["left"] == [
        p.detection.box[0] for p in answered
    ]


def holds(value, kind, values):
    """Whether a cell is what the published schema of Camtrap DP says."""
    if kind in ("number", "integer"):
        low, _, high = values.partition("..")
        number = float(value)
        return number >= float(low) and number <= float(high or "inf") and (kind == "number" or number.is_integer())
    if kind == "datetime":
        return bool(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)", value))
    return not values or value in values.split("|")


def test_camtrap_dp_is_what_its_schema_says(bundle, place, answered, tmp_path):
    out = tmp_path / "observations.csv"
    with pytest.warns(DataWarning) as told:
        answer(bundle, place, format="camtrap_dp", out=out)
    assert "the times of 2 observations are taken to be in UTC" in str(told[-1].message)
    facts, rows = {row["field"]: row for row in read_rows(CAMTRAP_FIELDS)}, read_rows(out)
    assert list(rows[0]) == camtrap_fields() == list(facts)
    for row in rows:
        for name, value in row.items():
            fact = facts[name]
            assert holds(value, fact["type"], fact["values"]) if value else not fact["required"], (name, value)
    assert len({row["observationID"] for row in rows}) == len(rows) == 4
    by_type = {row["observationType"]: row for row in rows}
    assert by_type.keys() == {"animal", "human", "blank"}
    assert (
        by_type["human"]["classificationProbability"] == "0.5" and by_type["human"]["classifiedBy"] == "md_v5a.0.0.pt"
    )
    assert (
        by_type["blank"]["mediaID"] == "b/empty.jpg" and not by_type["blank"]["bboxX"] and not by_type["blank"]["count"]
    )
    y = next(row for row in rows if row["mediaID"] == "b/y.jpg" and row["observationType"] == "animal")
    assert (y["deploymentID"], y["eventStart"]) == ("b", "2024-05-02T07:08:09+02:00")
    assert float(y["bboxX"]) == pytest.approx(0.1) and float(y["bboxHeight"]) == pytest.approx(0.41)
    for row, p in zip([row for row in rows if row["observationType"] == "animal"], answered, strict=True):
        crow = p.labels[0] == "001.crow"
        assert row["scientificName"] == ("Corvus corone" if crow else p.labels[0])


# --- only what lives here ---------------------------------------------------------------------------------------------


def test_only_what_lives_here_is_answered(bundle, tmp_path):
    image = scene((64, 64))
    (free,) = glsim.Predictor(bundle)(image)
    share = dict(zip(free.labels, free.probabilities, strict=True))
    second, third = free.labels[1:3]
    listed = write(tmp_path / "here.txt", third, "", f" {second} ", "griffon")
    with pytest.warns(DataWarning, match="here.txt: 1 of 3 labels are none of the model's: griffon"):
        (told,) = glsim.Predictor(bundle, only=listed)(image)
    assert told.labels == (second, third)
    whole = share[second] + share[third]
    assert told.probabilities == pytest.approx((share[second] / whole, share[third] / whole), abs=1e-5)
    assert told.otherwise == (free.labels[0], pytest.approx(free.probabilities[0], abs=1e-6))
    assert told.as_dict()["otherwise"]["label"] == free.labels[0] and "of all classes" in as_text([told])
    assert free.otherwise is None and "otherwise" not in free.as_dict()


def test_labels_of_a_place_by_label_name_and_group(tmp_path):
    file = write(
        tmp_path / "p.csv", "place,label", "north,004.wolf", "south,001.crow", "north,Corvus corone", "north,cats"
    )
    names = {"001.crow": glsim.data.class_names.ClassName("Crow", "Corvus corone")}
    assert read_allowed(file, LABELS, "north", {"cats": [4]}, names) == [0, 3, 4]
    assert read_allowed(file, LABELS, "south") == [0]
    with pytest.raises(DataError, match="p.csv: no place 'east'; there are: north, south"):
        read_allowed(file, LABELS, "east")
    with pytest.raises(
        DataError, match=r"x.txt: none of its 1 labels is one of the model's 5; close to '01.crow': 001.crow"
    ):
        read_allowed(write(tmp_path / "x.txt", "01.crow"), LABELS)
    with pytest.raises(DataError, match="gone.txt: cannot be read as a list of labels"):
        read_allowed(tmp_path / "gone.txt", LABELS)


# --- names of classes, and folders of answers -------------------------------------------------------------------------


def test_names_of_classes_stand_beside_labels(bundle, tmp_path):
    file = write(
        tmp_path / "n.csv", "label,name,scientific_name", "001.crow,Crow,Corvus corone", "x,y,z", "002.owl,,Strix"
    )
    names = read_class_names(file, LABELS)
    assert {label: str(name) for label, name in names.items()} == {
        "001.crow": "Crow (Corvus corone)",
        "002.owl": "Strix",
    }
    scene((64, 64)).save(tmp_path / "x.png")
    said = predict_images(bundle, [str(tmp_path / "x.png")], workers=0)
    assert list(said.class_names) == ["001.crow"] and said.predictions[0].labels[0] in LABELS  # of the bundle
    assert "001.crow = Crow (Corvus corone)" in as_text(said.predictions, said.class_names)
    with pytest.raises(DataError, match="n.csv, line 3: label 'a' stands in line 2 already"):
        read_class_names(write(tmp_path / "n.csv", "label,name", "a,b", "a,c"), ["a"])
    with pytest.raises(DataError, match="n.csv: no name of any of the 1 classes, as 'q'"):
        read_class_names(write(tmp_path / "n.csv", "label,name", "a,b"), ["q"])


@pytest.mark.parametrize("links", [False, True])
def test_images_are_filed_and_nothing_is_overwritten(tmp_path, links):
    one, other = (write(tmp_path / folder / "x.jpg", folder) for folder in "ab")
    answered = [(str(one), "a/b: crow"), (str(other), "a/b: crow"), (str(one), "owl"), (str(one), "owl")]
    assert sort_into(tmp_path / "out", answered, links) == 3
    files = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").glob("*/*")}
    assert {name: path.read_text().strip() for name, path in files.items()} == {
        "a_b_ crow/x.jpg": "a",
        "a_b_ crow/x_2.jpg": "b",
        "owl/x.jpg": "a",
    }
    assert all(path.is_symlink() == links for path in files.values())
    assert sort_into(tmp_path / "out", answered, links) == 0 and len(list((tmp_path / "out").glob("*/*"))) == 3


def test_a_file_of_boxes_is_no_place_for_images(bundle, place, tmp_path):
    with pytest.raises(ConfigError, match="format=coco: it is a file of boxes; add --boxes FILE and --out FILE"):
        predict_images(bundle, [str(place / "photos")], format="coco", out=tmp_path / "x.json")
    assert read_annotations(place / "md.json", 0.3, ["animal"])["b/y.jpg"].boxes[0].confidence == 0.926
