import csv
import importlib.util
import io
import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import glsim
from glsim import cli
from glsim.cli import predict, predict_bulk
from glsim.data.images import BadImage, open_image
from glsim.data.transforms import Preprocessing, eval_transform, mask_transform, to_picture, train_transform
from glsim.files import document
from glsim.inference.bulk_files import as_row, schema
from glsim.inference.formats import FORMATS
from glsim.inference.predictor import Prediction, predict_images, to_original
from glsim.types import ConfigError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i, size in enumerate([(80, 60), (60, 80), (64, 64), (300, 100)]):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_answers_come_in_order_whatever_the_batch_and_workers(run_folder, photos):
    paths = [photos / f"{i}.png" for i in (2, 0, 3, 1)]
    one = glsim.Predictor(run_folder, batch_size=1)(paths)
    many = glsim.Predictor(run_folder, batch_size=3, workers=2)(paths)
    memory = glsim.Predictor(run_folder)([open_image(p) for p in paths])
    assert [a.path for a in one] == [str(p) for p in paths]
    assert [a.path for a in memory] == [None] * 4
    for a, b, c in zip(one, many, memory, strict=True):
        assert a.labels == b.labels == c.labels and a.box == b.box == c.box
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)
        assert a.probabilities == pytest.approx(c.probabilities, abs=1e-5)
        assert sum(a.probabilities) == pytest.approx(1) and list(a.probabilities) == sorted(a.probabilities)[::-1]


def test_one_image_or_one_path_is_fine_too(run_folder, photos):
    (a,) = glsim.Predictor(run_folder, top_k=2)(photos / "0.png")
    (b,) = glsim.Predictor(run_folder, top_k=2)(open_image(photos / "0.png"))
    assert len(a.labels) == 2 and a.labels == b.labels


def test_boxes_are_in_pixels_of_the_image(run_folder, photos):
    for answer in glsim.Predictor(run_folder)(sorted(photos.glob("*.png"))):
        with Image.open(answer.path) as image:
            width, height = image.size
        left, top, right, bottom = answer.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_box_back_to_the_image_by_hand():
    p = Preprocessing((100, 100), 1.5, (0.5,) * 3, (0.5,) * 3)  # squeezed to 150, the centre 100 seen
    assert to_original([0, 0, 100, 100], (300, 600), p) == (50, 100, 250, 500)
    assert to_original([10, 20, 60, 70], (150, 150), p) == (35, 45, 85, 95)


def test_a_marked_spot_is_found_again_through_the_transform():
    """The independent truth: paint a spot, see where the transform puts it, map that back."""
    p = Preprocessing((64, 64), 1.34, (0.5,) * 3, (0.5,) * 3)
    pixels = np.zeros((200, 120, 3), np.uint8)
    pixels[90:110, 50:70] = 255
    seen = to_picture(eval_transform(p)(Image.fromarray(pixels)), p)[..., 0] > 127
    rows, cols = np.where(seen)
    left, top, right, bottom = to_original([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1], (120, 200), p)
    assert abs(left - 50) <= 2 and abs(right - 70) <= 2 and abs(top - 90) <= 3 and abs(bottom - 110) <= 3
    mask = mask_transform(p)(Image.fromarray(pixels[..., 0]))
    assert (mask.numpy() != seen).mean() < 0.01


def test_bad_files_are_named_or_skipped(run_folder, photos, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"")
    open_image(photos / "0.png").save(tmp_path / "good.png")
    images = [str(tmp_path)]
    with pytest.raises(BadImage, match=r"bad.jpg: empty file"):
        predict_images(run_folder, images, workers=0)
    result = predict_images(run_folder, images, workers=0, skip_bad=True)
    assert len(result.predictions) == 1 and len(result.skipped) == 1
    only_bad = predict_images(run_folder, [str(tmp_path / "bad.jpg")], workers=0, skip_bad=True)
    assert only_bad.predictions == []


def test_formats_hold_the_same(run_folder, photos, tmp_path):
    answers = glsim.Predictor(run_folder, top_k=2)(sorted(photos.glob("*.png")))
    lines = FORMATS["jsonl"](answers).splitlines()
    assert [json.loads(line)["path"] for line in lines] == [a.path for a in answers]
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](answers))))
    assert len(rows) == 8 and rows[1]["rank"] == "2" and rows[0]["label"] == answers[0].labels[0]
    assert answers[0].labels[0] in FORMATS["text"](answers).splitlines()[0]
    plain = Prediction("x.jpg", ("a",), (1.0,), None)
    assert FORMATS["csv"]([plain]).splitlines()[1] == "x.jpg,1,a,1.000000,,,,"
    out = tmp_path / "answers.csv"
    result = predict_images(run_folder, [str(photos)], out=out, top_k=2, workers=0)  # by its ending
    assert out.read_text() == FORMATS["csv"](answers)
    assert document(result)["predictions"] == [json.loads(line) for line in lines]
    with pytest.raises(ConfigError, match="unknown format 'xml'; choose from: camtrap_dp, coco, csv, jsonl"):
        predict_images("gone", ["gone"], format="xml")


def test_a_file_whose_name_is_no_text_does_not_lose_the_others(run_folder, photos, tmp_path):
    name, seen = os.fsdecode(b"a\xff.png"), tmp_path / "seen"
    seen.mkdir()
    try:
        open_image(photos / "0.png").save(seen / name, "PNG")
    except OSError:
        pytest.skip("this file system takes text only")
    for ending in ("jsonl", "csv", "txt"):
        out = tmp_path / "new" / "folder" / f"answers.{ending}"  # made before anything is computed
        predict_images(run_folder, [str(seen)], out=out, workers=0)
        assert "a\\udcff.png" in out.read_text(encoding="utf-8")
    told = json.loads((out.parent / "answers.jsonl").read_text(encoding="utf-8"))
    assert told["path"] == str(seen / name)
    (answer,) = glsim.Predictor(run_folder)(seen / name)
    pa = pytest.importorskip("pyarrow")
    row = as_row(str(answer.path), answer)
    assert pa.Table.from_pylist([row], schema(False))["path"][0].as_py().endswith("a\\udcff.png")


def test_an_out_that_cannot_be_made_is_said_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        predict_images("gone", ["gone"], out=tmp_path / "file" / "a.csv")


def test_train_transforms_make_normalised_images_of_the_right_size():
    p = Preprocessing((48, 64), 1.34, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert p.resize == (64, 85)
    image = Image.fromarray(np.full((30, 200, 3), 128, np.uint8))
    for augment in ("none", "weak", "medium"):
        for crop in ("random", "resized"):
            assert train_transform(p, augment, crop)(image).shape == (3, 48, 64)
    assert (to_picture(eval_transform(p)(image), p) == 128).all()
    assert Preprocessing.from_dict(json.loads(json.dumps(p.as_dict()))) == p
    with pytest.raises(glsim.ConfigError, match="preprocessing"):
        Preprocessing.from_dict({"image_size": [3]})
    assert torch.is_tensor(train_transform(p)(image))


def test_the_script_times_predict_beside_its_parts(run_folder, photos, capsys):
    spec = importlib.util.spec_from_file_location("predict_benchmark", ROOT / "benchmarks" / "predict.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    words = [str(run_folder), str(photos), "--images", "7", "--batch-size", "3", "--workers", "0", "--device", "cpu"]
    found = script.main([*words, "--json"])
    assert json.loads(capsys.readouterr().out) == found
    assert found["images"] == 7 and min(found["predict_s"], found["model_s"], found["decode_s"]) > 0
    assert found["floor_s"] >= max(found["model_s"], found["decode_s"])
    assert 0 < found["memory_early_mib"] <= found["memory_mib"]
    assert "7 images, batches of 3, 0 loading processes" in script.as_text(found)


def test_what_a_spreadsheet_would_run_is_text(tmp_path):
    labels = ("=cmd|' /C calc'!A0", "+1", "-2+3", "@x", "a\n# b", "x\x1b[31m", "'=x", "-5", "plain", "\uff1d1")
    odd = Prediction("=a.jpg", labels, (0.1,) * len(labels), (-1, 2, 3, 4))
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"]([odd]))))
    assert [row["label"] for row in rows] == [
        *("'=cmd|' /C calc'!A0", "+1", "'-2+3", "'@x", "a\\n# b", "x\\x1b[31m", "''=x", "-5", "plain", "'\uff1d1")
    ]
    assert {row["path"] for row in rows} == {"'=a.jpg"} and {row["left"] for row in rows} == {"-1"}
    text = FORMATS["text"]([odd._replace(path="b\nc\x1b.jpg")])
    assert text.count("\n") == 1 and "\x1b" not in text and text.startswith("b\\nc\\x1b.jpg: ")
    told = json.loads(FORMATS["jsonl"]([odd._replace(path="b\nc\x1b.jpg")]))
    assert told["path"] == "b\nc\x1b.jpg" and [a["label"] for a in told["answers"]] == list(labels)


def test_home_folder_in_paths(run_folder, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(run_folder)
    (tmp_path / "photos").symlink_to(photos)
    (answer,) = glsim.Predictor("~/run")("~/photos/0.png")
    assert answer.path == "~/photos/0.png"
    assert cli.main(["predict", "~/run", "~/photos", "--out", "~/new/a.csv", "--workers", "0"]) == 0
    assert (tmp_path / "new" / "a.csv").is_file()
    glsim.save(glsim.load("~/run"), "~/again")
    assert (tmp_path / "again" / "config.json").is_file()


@pytest.mark.parametrize("images", [["s3://bucket/x"], ["list.csv"], ["a.jpg", "list.parquet"]])
def test_what_only_ray_reads_names_the_verb(images):
    with pytest.raises(ConfigError, match="need glsim predict bulk"):
        predict.Options(source="run", images=images)
    assert predict_bulk.Options(source="run", images=images, out="o").images == images
