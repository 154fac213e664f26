"""Counting: the same whatever the batch, averaged over mirror images on request."""

import csv
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import small_model
from PIL import ImageOps

import glsim
from glsim.checkpoints.bundle import preprocessing_of
from glsim.cli.eval import Options, show
from glsim.data.images import open_image
from glsim.data.loaders import make_loader
from glsim.data.readers import read_data
from glsim.data.transforms import eval_transform
from glsim.environment import make_accelerator
from glsim.evaluation import evaluate
from glsim.evaluation.evaluate import evaluate_bundle
from glsim.files import MARKER
from glsim.inference.predictor import predict_images


def answers(folder, *columns):
    with (folder / "predictions.csv").open() as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


def test_one_image_at_a_time_counts_the_same(run_folder, birds, tmp_path):
    results = []
    for size in (1, 4, 32):
        out = tmp_path / str(size)
        result = evaluate_bundle(run_folder, birds, split="all", batch_size=size, workers=0, out=out)
        results.append((result, answers(out, "path", "prediction")))
    first, rows = results[0]
    assert len(rows) == first.count == 27
    for result, others in results[1:]:
        assert others == rows
        for key in ("correct", "correct_top5", "per_class", "per_class_mean", "per_class_std", "split_hash"):
            assert getattr(result, key) == getattr(first, key)


@pytest.mark.parametrize("method", glsim.METHODS)
def test_no_method_lets_images_of_a_batch_meet(method, birds):
    """In evaluation; dcal pairs them in training."""
    model = small_model(method, "resnet18" if method == "cal" else "vit_tiny_patch16_224", classes=3)
    images = read_data(birds)["test"]
    accelerator = make_accelerator("cpu")
    alone, together = (
        evaluate.evaluate(
            model, make_loader(images, eval_transform(preprocessing_of(model)), size, 0), 3, accelerator, flip=True
        )
        for size in (1, 9)
    )
    assert torch.equal(alone.confusions(), together.confusions()) and alone.correct_top5 == together.correct_top5
    assert torch.allclose(alone.confidences, together.confidences, atol=1e-5)
    assert torch.allclose(alone.true_confidences, together.true_confidences, atol=1e-5)


class Sides(torch.nn.Module):
    """Logits: mean of the left half, of the right half, of nothing."""

    def forward(self, images):
        left, right = (half.mean(dim=(1, 2, 3)) for half in images.chunk(2, dim=3))
        return glsim.Output(torch.stack((left, right, torch.zeros_like(left)), dim=1))


def test_flip_averages_the_logits_of_both():
    images = torch.zeros(2, 3, 2, 4)
    images[0, ..., 0] = 4.0  # left 2, right 0; mirrored 0, 2; so 1, 1 and 0
    images[1] = -1.0
    labels, accelerator = torch.tensor([1, 2]), make_accelerator("cpu")
    plain = evaluate.evaluate(Sides(), [(images, labels)], 3, accelerator)
    flipped = evaluate.evaluate(Sides(), [(images, labels)], 3, accelerator, flip=True)
    weights = torch.tensor([2.0, 0, 0]).exp()
    assert plain.predictions.tolist() == [0, 2] and flipped.predictions.tolist()[1] == 2
    assert plain.true_confidences[0] == pytest.approx(float(weights[1] / weights.sum()))
    e = torch.e
    assert flipped.true_confidences[0] == pytest.approx(e / (2 * e + 1))
    assert flipped.confidences[1] == pytest.approx(float(plain.confidences[1]), abs=1e-6)


def test_a_mirror_image_gets_the_same_answer_with_flip(birds):
    model = small_model(classes=3)
    p = replace(preprocessing_of(model), resize_ratio=1.0)  # 1.34 leaves a margin of 10.5 pixels, which has no middle
    model.config = replace(model.config, preprocessing=p.as_dict())
    paths = read_data(birds)["test"].paths[:4]
    images = [open_image(path) for path in paths]
    there = glsim.Predictor(model, flip=True)(images)
    back = glsim.Predictor(model, flip=True)([ImageOps.mirror(image) for image in images])
    without = glsim.Predictor(model)(images)
    batch = torch.stack([eval_transform(p)(image) for image in images])
    with torch.inference_mode():
        logits = (model(batch).logits + model(batch.flip(3)).logits) / 2
    for a, b, c, row in zip(there, back, without, logits.softmax(dim=1), strict=True):
        assert a.labels == b.labels and a.probabilities == pytest.approx(b.probabilities, abs=1e-4)
        assert a.probabilities == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-6)
        assert a.probabilities != pytest.approx(c.probabilities, abs=1e-5)
        assert a.box == c.box


def test_flip_of_the_verbs(run_folder, birds, tmp_path):
    for flip in (False, True):
        evaluate_bundle(run_folder, birds, workers=0, flip=flip, out=tmp_path / str(flip))
        assert json.loads((tmp_path / str(flip) / "evaluation.json").read_text())["flip"] is flip
    paths = [str(path) for path in read_data(birds)["test"].paths]
    said = predict_images(run_folder, paths, workers=0, flip=True).predictions
    plain, flipped = (answers(tmp_path / flip, "prediction", "confidence") for flip in ("False", "True"))
    assert [a.labels[0] for a in said] == [prediction for prediction, _ in flipped]
    assert [a.probabilities[0] for a in said] == pytest.approx([float(p) for _, p in flipped], abs=1e-5)
    assert [p for _, p in plain] != [p for _, p in flipped]


def test_the_confusion_is_a_table_at_any_size_and_a_picture_where_it_can_be_read(
    tmp_path, monkeypatch, run_folder, birds
):
    for folder, most in (("small", 60), ("large", 2)):
        monkeypatch.setattr(evaluate, "MOST_CLASSES_DRAWN", most)
        s = Options(source=str(run_folder), data=str(birds), split="all", workers=0, out=str(tmp_path / folder))
        result = evaluate_bundle(**vars(s))
        assert sorted(result.written) == sorted(p.name for p in (tmp_path / folder).iterdir() if p.name != MARKER)
        assert ("confusion.png" in result.written) == (folder == "small")
        assert ("no confusion.png: 3 classes" in "\n".join(show(result, s))) == (folder == "large")
        with (tmp_path / folder / "confusion.csv").open() as file:
            table = {(row["label"], row["prediction"]): int(row["count"]) for row in csv.DictReader(file)}
        assert table == Counter(answers(tmp_path / folder, "label", "prediction"))
    wrong = sorted(((n, pair) for pair, n in table.items() if pair[0] != pair[1]), key=lambda row: -row[0])
    assert [x.count for x in result.confused] == [n for n, _ in wrong]
    for x in result.confused:
        assert x.count == table[x.label, x.prediction] and x.of == 9
        assert f"  {x.label} taken for {x.prediction}: {x.count} of 9" in "\n".join(show(result, s))


def test_ten_thousand_classes_are_counted_without_their_square():
    """A hundred million cells would be 800 MB, and a file of 200."""
    count, classes = 20_000, [f"c{i}" for i in range(10_000)]
    labels = torch.arange(count) % 10_000
    predictions = torch.where(torch.arange(count) < 30, 5, labels)
    nothing = torch.zeros(count)
    result = evaluate.Evaluation(count, labels, predictions, nothing, nothing, 1.0, nothing, nothing)
    assert result.summary(classes).correct == count - 29
    table = evaluate.confusion_table(result, classes)
    assert len(table.splitlines()) == 1 + 10_000 + 29 and "\nc3,c5,1\n" in table
    assert len(evaluate.most_confused(result, classes)) == evaluate.MOST_CONFUSED


def test_mean_and_deviation_over_classes():
    labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    predictions = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    nothing = torch.zeros(12)
    result = evaluate.Evaluation(12, labels, predictions, nothing, nothing, 1.0, nothing, nothing)
    summary = result.summary("abcd")
    assert summary.per_class_mean == pytest.approx((0.75 + 0.5 + 1) / 3)  # d has no images
    assert summary.per_class_std == pytest.approx((((0 + 0.25**2 + 0.25**2) / 3) ** 0.5), abs=1e-6)
