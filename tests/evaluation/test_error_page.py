"""The page of mistakes: who stands on it, in which order, with which pictures."""

import base64
import csv
import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_model
from PIL import Image, ImageOps

import glsim
from glsim.data.images import open_image
from glsim.data.readers import ImageList, read_data
from glsim.evaluation import error_page
from glsim.evaluation.error_page import Mistake, confused_pairs, find_mistakes, write_page
from glsim.evaluation.evaluate import evaluate_bundle

CARD = re.compile(r'<article class="card" id="m(\d+)">(.*?)</article>', re.S)


def about(classes, images=3, data="data"):
    """What the page tells of an evaluation of nine images."""
    counts = {c: [0, images] for c in classes}
    return SimpleNamespace(source="run", data=data, split="test", flip=False, count=9, top1=0.5, per_class=counts)


def picture(address):
    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/jpeg;base64,")))).convert("RGB")


def shown(page):
    """For each card: (number, its text without tags, its pictures)."""
    cards = []
    for number, text in CARD.findall(page.read_text(encoding="utf-8")):
        pictures = [picture(address) for address in re.findall(r'src="([^"]+)"', text)]
        cards.append((int(number), " ".join(re.sub(r"<[^>]*>", " ", text).split()), pictures))
    return cards


def differ(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b.resize(a.size), float)).mean()


def test_mistakes_are_sorted_by_confidence():
    images = ImageList(tuple(Path(f"{i}.png") for i in range(5)), (0, 1, 2, 0, 1), ("a", "b", "c"))
    found = find_mistakes(images, [0, 0, 1, 2, 2], [0.9, 0.5, 0.7, 0.6, 0.7], [0.9, 0.3, 0.2, 0.1, 0.25])
    assert found == [
        Mistake(Path("2.png"), 2, 1, 0.7, 0.2),
        Mistake(Path("4.png"), 1, 2, 0.7, 0.25),
        Mistake(Path("3.png"), 0, 2, 0.6, 0.1),
        Mistake(Path("1.png"), 1, 0, 0.5, 0.3),
    ]
    assert find_mistakes(images, images.labels, [1.0] * 5, [1.0] * 5) == []


def test_pairs_count_both_directions():
    wrong = [(0, 1)] * 2 + [(1, 0)] * 3 + [(2, 0)] * 4 + [(1, 2)] + [(2, 1)]
    found = confused_pairs([Mistake(Path("x"), truth, answer, 0.5, 0.1) for truth, answer in wrong])
    assert found == [((1, 0), (3, 2)), ((2, 0), (4, 0)), ((1, 2), (1, 1))]


@pytest.fixture(scope="module")
def page(run_folder, birds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors") / "deep" / "page"
    return evaluate_bundle(run_folder, birds, split="all", workers=0, errors=folder, out=folder / "all"), folder


def test_the_page_shows_every_mistake(page, birds):
    result, folder = page
    assert result.errors == str(folder / "index.html")
    assert {p.name for p in folder.iterdir()} == {".glsim", "index.html", "all"}
    with (folder / "all" / "predictions.csv").open() as file:
        wrong = [row for row in csv.DictReader(file) if row["label"] != row["prediction"]]
    wrong.sort(key=lambda row: -float(row["confidence"]))
    cards = shown(folder / "index.html")
    assert wrong and len(cards) == len(wrong) == result.count - result.correct
    for number, (card, row) in enumerate(zip(cards, wrong, strict=True), start=1):
        label, said = row["label"].replace("_", " "), row["prediction"].replace("_", " ")
        assert card[0] == number and card[1].startswith(f"{number}. {label} taken for {said} ")
        assert f"{said} {float(row['confidence']):.1%}, {label} " in card[1]
        assert str(Path(row["path"]).relative_to(birds)) in card[1] and str(birds) not in card[1]
    text = (folder / "index.html").read_text()
    assert f"<h1>{len(wrong)} of 27 images wrong</h1>" in text
    assert "glsim encoded what is in the box once more" in text and "about which the model was surest" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "<script" not in text  # needs no other file


def test_the_pictures_are_photograph_heat_map_and_crop(page, run_folder, birds):
    model = glsim.load(run_folder)
    paths = {str(p.relative_to(birds)): p for i in read_data(birds).values() for p in i.paths}
    for _, text, (whole, heat, crop) in shown(page[1] / "index.html"):
        path = next(p for name, p in paths.items() if name in text)
        photograph = open_image(path)
        (answer,) = glsim.Predictor(model)(path)
        assert whole.size == heat.size == (256, 256)
        assert differ(crop, photograph.crop(answer.box)) < 4 < differ(crop, photograph)
        assert 0.5 < differ(whole, photograph) < 30 < differ(heat, photograph) + 20  # a box; colours
        assert differ(heat, whole) > 8


def test_examples_are_the_first_training_images(page, birds):
    text = (page[1] / "index.html").read_text()
    train = read_data(birds)["train"]
    drawn = dict(re.findall(r"\.of(\d+) { background-image: url\(([^)]+)\) }", text))
    assert drawn
    for label, address in drawn.items():
        first = train.paths[train.labels.index(int(label))]
        assert differ(picture(address), open_image(first)) < 4
    for _, body in CARD.findall(text):
        assert len(re.findall(r'class="example of\d+"', body)) == 2


def test_only_so_many_are_shown(monkeypatch, birds, tmp_path):
    monkeypatch.setattr(error_page, "MOST", 2)
    monkeypatch.setattr(error_page, "PAIRS", 1)
    images = read_data(birds)["test"]
    model = small_model(classes=3)
    wrong = find_mistakes(images, [(y + 1 + (i == 0)) % 3 for i, y in enumerate(images.labels)], [0.5] * 9, [0.2] * 9)
    page = write_page(tmp_path, model, wrong, images.classes, None, about(images.classes))
    text = page.read_text()
    assert [number for number, _, _ in shown(page)] == [1, 2]
    assert "<h1>9 of 9 images wrong</h1>" in text and "The 2 of 9 about which the model was surest." in text
    assert text.count('class="pair"') == 1 and "and 2 more pairs" in text
    assert text.count("no training image of") == 2 + 2 * 2  # there is no train split


def test_no_mistakes(birds, tmp_path):
    classes = read_data(birds)["test"].classes
    page = write_page(tmp_path, small_model(classes=3), [], classes, None, about([]))
    assert "<h1>None of 9 images wrong</h1>" in page.read_text() and not shown(page)


@pytest.mark.parametrize(
    ("method", "backbone"),
    [(m, "vit_tiny_patch16_224") for m in glsim.METHODS if m != "cal"] + [("cal", "resnet18"), ("plain", "resnet18")],
)
def test_every_method_has_a_page(method, backbone, birds, tmp_path):
    splits = read_data(birds)
    model = small_model(method, backbone, classes=3)
    wrong = [Mistake(path, 0, 1, 0.9, 0.05) for path in splits["test"].paths[:3]]
    page = write_page(tmp_path, model, wrong, splits["test"].classes, splits["train"], about(splits["test"].classes))
    cards = shown(page)
    assert len(cards) == 3 and all(len(pictures) == 3 for _, _, pictures in cards)
    crops = model(torch.zeros(1, 3, 64, 64)).crops is not None
    assert (f"{method} encoded what is in the box" in page.read_text()) == crops


def test_odd_images_and_odd_names(tmp_path):
    for name, size in (("wide <b>", (9000, 2)), ("tiny & small", (2, 3))):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        Image.new("RGB", size, "teal").save(tmp_path / "data" / "test" / name / "x<y>.png")
    (tmp_path / "data" / "train" / "tiny & small").mkdir(parents=True)
    (tmp_path / "data" / "train" / "tiny & small" / "0.png").write_bytes(b"broken")
    ImageOps.expand(Image.new("RGB", (8, 8)), 2, "red").save(tmp_path / "data" / "train" / "tiny & small" / "1.png")
    images = read_data(tmp_path / "data" / "test", test_fraction=0)["train"]
    train = read_data(tmp_path / "data" / "train", test_fraction=0, classes=images.classes)["train"]
    wrong = [Mistake(path, label, 1 - label, 0.9, 0.1) for path, label in zip(images.paths, images.labels, strict=True)]
    told = about(images.classes, 1, tmp_path / "data")
    page = write_page(tmp_path, small_model(classes=2), wrong, images.classes, train, told)
    text = page.read_text()
    assert "<b>wide &lt;b&gt;</b> taken for <b>tiny &amp; small</b>" in text and "x&lt;y&gt;.png" in text
    assert "x<y>" not in text and "no training image of wide &lt;b&gt;" in text
    (whole, _, _), _ = (pictures for _, _, pictures in shown(page))
    assert max(whole.size) == 256
    (example,) = re.findall(r"url\(([^)]+)\)", text)
    assert picture(example).getpixel((5, 5))[0] > 200  # the broken image is passed over


def test_a_folder_that_cannot_be_made_is_named_first(run_folder, birds, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        evaluate_bundle("not even looked for", birds, errors=tmp_path / "file")
