"""Calibration error, risk and coverage, thresholds and taxonomies, against naive code; what the verbs make of them."""

import csv
import io
import json
import shutil

import pytest
import torch
from conftest import write
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchmetrics.functional.classification import multiclass_calibration_error

import glsim
from glsim import cli
from glsim.checkpoints.bundle import read_config
from glsim.data.hierarchy import decide, flat, read_taxonomy
from glsim.evaluation import evaluate
from glsim.evaluation.confidence import calibration_error, find_threshold, reliability, risk_coverage
from glsim.files import document
from glsim.inference.predictor import predict_images

LABELS = ("robin", "wren", "oak", "elm")
TAXONOMY = ("label,genus,kingdom", "elm,tree,plant", "robin,bird,animal", "oak,tree,plant", "wren,bird,animal")


def scored(rows):
    """(confidence, right) pairs as two tensors."""
    confidences, right = zip(*rows, strict=True)
    return torch.tensor(confidences), torch.tensor(right)


TENTHS = st.integers(0, 10).map(lambda i: i / 10)  # with ties
SCORED = st.lists(st.tuples(TENTHS | st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=40).map(scored)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_the_calibration_error_is_that_of_the_library_and_of_the_bins(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = 2 * torch.randn(200, 7, generator=generator), torch.randint(7, (200,), generator=generator)
    confidences, guesses = logits.softmax(1).max(1)
    right = guesses == labels
    found = calibration_error(confidences, right)
    assert found == pytest.approx(
        float(multiclass_calibration_error(logits.softmax(1), labels, 7, n_bins=15)), abs=1e-6
    )
    bins = reliability(confidences, right)
    assert int(bins.images.sum()) == 200
    assert found == pytest.approx(float((bins.images / 200 * (bins.confidence - bins.accuracy).abs()).sum()), abs=1e-6)


@given(SCORED)
def test_risk_and_coverage_against_every_threshold_tried(rows):
    (confidences, right), total = rows, len(rows[0])
    curve = risk_coverage(confidences, right)
    errors = []
    for c in confidences.tolist():
        kept = [ok for other, ok in zip(confidences.tolist(), right.tolist(), strict=True) if other >= c]
        errors.append(1 - sum(kept) / len(kept))
        row = curve.thresholds.tolist().index(c)
        assert float(curve.coverage[row]) == pytest.approx(len(kept) / total)
        assert float(curve.error[row]) == pytest.approx(errors[-1])
    assert curve.area == pytest.approx(sum(errors) / total)
    assert risk_coverage(confidences.flip(0), right.flip(0)).area == curve.area  # the order does not matter
    points = curve.points()
    assert points[-1]["coverage"] == 1 and points[-1]["error"] == pytest.approx(1 - float(right.float().mean()))
    for i, share in enumerate(torch.arange(1, 21) / 20):
        at_least = [float(c) for c in curve.coverage if c >= share - 1e-6]
        assert any(p["coverage"] == at_least[0] for p in points[: i + 1])


@given(SCORED, st.sampled_from([0.0, 5.0, 20.0, 90.0]))
def test_the_threshold_against_every_one_tried(rows, max_error):
    confidences, right = rows
    values = confidences.tolist()

    def count(threshold):
        kept = [ok for c, ok in zip(values, right.tolist(), strict=True) if c >= threshold]
        return len(kept), kept.count(False)

    def bad(threshold):
        n, wrong = count(threshold)
        return wrong > max(1, max_error / 100 * n + 1e-9)

    good = [
        t
        for t in sorted(set(values))
        if count(t)[1] <= max_error / 100 * count(t)[0] + 1e-9 and not any(bad(u) for u in set(values) if u >= t)
    ]
    threshold, answered = find_threshold(confidences, right, max_error)
    if not good:
        assert threshold is None and not answered.any()
        return
    assert answered.tolist() == [c >= good[0] for c in values]
    assert answered.tolist() == [c >= threshold for c in values]


def test_one_wrong_image_at_the_top_is_no_rate_and_two_are():
    confidences = torch.linspace(1, 0.5, 100)
    right = torch.ones(100, dtype=torch.bool)
    right[0] = False
    threshold, answered = find_threshold(confidences, right, 5)
    assert threshold == 0 and answered.all()
    right[1] = False
    assert find_threshold(confidences, right, 5)[0] is None


# --- taxonomies -------------------------------------------------------------------------------------------------------


def test_a_level_is_as_likely_as_its_labels_together(tmp_path):
    taxonomy = read_taxonomy(write(tmp_path / "t.csv", *TAXONOMY), LABELS)
    assert taxonomy.levels == ("label", "genus", "kingdom") and taxonomy.groups[0] == LABELS
    p = torch.tensor([[0.4, 0.35, 0.25, 0.0], [0.1, 0.1, 0.1, 0.7], [0.3, 0.2, 0.25, 0.25]])
    groups, sums = taxonomy.best(p)
    names = [[taxonomy.groups[i][g] for i, g in enumerate(row)] for row in groups.tolist()]
    assert names[:2] == [["robin", "bird", "animal"], ["elm", "tree", "plant"]]
    torch.testing.assert_close(sums[:2], torch.tensor([[0.4, 0.75, 0.75], [0.7, 0.8, 0.8]]))
    assert decide(sums, 0.65).tolist() == [1, 0, -1]
    assert taxonomy.truth(torch.tensor([3])).tolist() == [[3, *groups[1, 1:].tolist()]]
    groups, sums = flat(LABELS).best(p)
    assert torch.equal(sums[:, 0], p.max(1).values) and torch.equal(groups[:, 0], p.max(1).indices)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["name,genus"], r"t\.csv: the first line names the levels.*label,genus,family.*got 'name', 'genus'"),
        (["label"], "the first line names the levels"),
        (["label,genus,genus"], "the first line names the levels"),
        ([*TAXONOMY, "robin,bird,animal"], r"t\.csv, line 6: label 'robin' stands in line 3 already"),
        ([*TAXONOMY, "robbin,bird,animal"], r"line 6: the model has no label 'robbin'; close to it: robin"),
        (TAXONOMY[:-1], r"t\.csv: 1 of the model's 4 labels are missing: 'wren'"),
        ([*TAXONOMY[:-1], "wren,,animal"], r"line 5: label 'wren': wanted label, genus, kingdom, got 'wren', ''"),
        ([*TAXONOMY[:-1], "wren,bird"], r"line 5: label 'wren'"),
        ([*TAXONOMY[:-1], "wren,bird,plant"], r"line 5: label 'wren': genus 'bird' is in kingdom 'plant' here.*line 3"),
    ],
)
def test_a_taxonomy_that_makes_no_sense_is_refused_by_line_and_label(tmp_path, lines, words):
    with pytest.raises(glsim.DataError, match=words):
        read_taxonomy(write(tmp_path / "t.csv", *lines), LABELS)
    with pytest.raises(glsim.DataError, match=r"none\.csv: not readable"):
        read_taxonomy(tmp_path / "none.csv", LABELS)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_taxonomy_is_read_as_every_list_is(tmp_path, delimiter):
    lines = "\n".join(["LABEL,Genus", "cafe\u0301\u00a0noir ,b", "tea,b"]).replace(",", delimiter)
    (tmp_path / "t.csv").write_bytes(lines.encode("utf-8-sig"))
    labels = ["tea", "cafe\u0301 noir"]  # a model's labels keep their spelling
    taxonomy = read_taxonomy(tmp_path / "t.csv", labels)
    assert taxonomy.groups == (tuple(labels), ("b",)) and taxonomy.of.tolist() == [[0, 1], [0, 0]]
    (tmp_path / "t.csv").write_text(lines, encoding="utf-16")
    with pytest.raises(glsim.DataError, match=r"t\.csv: .*it is in UTF-16\); what works: save it as UTF-8"):
        read_taxonomy(tmp_path / "t.csv", labels)


# --- the verbs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sure(run_folder, birds, tmp_path):
    """A run whose threshold lies in the middle of the confidences of its test images, with a taxonomy of two groups."""
    folder = shutil.copytree(run_folder, tmp_path / "sure")
    measured = evaluate.evaluate_bundle(folder, birds, workers=0)
    middle = measured.risk_coverage[len(measured.risk_coverage) // 2]["threshold"]
    config = read_config(folder).as_dict()
    config["calibration"] = {"temperature": 1.0, "count": 9, "data": "birds", "max_error": 5.0, "threshold": middle}
    (folder / "config.json").write_text(json.dumps(config))
    labels = config["label_names"]
    write(tmp_path / "t.csv", "label,kind", f"{labels[0]},one", f"{labels[1]},two", f"{labels[2]},two")
    return folder, tmp_path / "t.csv", labels, middle


def test_eval_reports_what_its_predictions_say(sure, birds, tmp_path, capsys):
    folder, taxonomy, labels, middle = sure
    words = [str(folder), "--data", str(birds), "--workers", "0", "--out", str(tmp_path / "e"), "--reject"]
    assert cli.main(["eval", *words, "--taxonomy", str(taxonomy)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "e" / "predictions.csv").read_text())))
    confidences = torch.tensor([float(row["confidence"]) for row in rows])
    right = torch.tensor([row["label"] == row["prediction"] for row in rows])
    assert found["ece"] == pytest.approx(calibration_error(confidences, right), abs=1e-5)
    assert found["aurc"] == pytest.approx(risk_coverage(confidences, right).area, abs=1e-6)
    assert f"calibration error {found['ece']:.2%}" in printed and f"AURC {found['aurc']:.4f}" in printed
    with Image.open(tmp_path / "e" / "confidence.png") as picture:
        assert picture.width > 900

    asked = dict(workers=0, top_k=3, reject=True, taxonomy=taxonomy)
    said = document(predict_images(folder, [str(birds / "test")], **asked))["predictions"]
    kinds = {labels[0]: "one", labels[1]: "two", labels[2]: "two"}
    answered = correct = fine = 0
    for row in said:
        best = row["answers"][0]
        sums = {
            kind: sum(a["probability"] for a in row["answers"] if kinds[a["label"]] == kind) for kind in ("one", "two")
        }
        kind = max(sums, key=lambda k: sums[k])
        truth = row["path"].split("/")[-2]
        if best["probability"] >= middle:
            expected = (best["label"], "label")
            right_one = best["label"] == truth
            fine += 1
        elif sums[kind] >= middle:
            expected, right_one = (kind, "kind"), kind == kinds[truth]
        else:
            expected, right_one = ("unknown", None), None
        assert (row["verdict"]["label"], row["verdict"]["level"]) == expected
        answered, correct = answered + (right_one is not None), correct + bool(right_one)
    told = found["answered"]
    assert 0 < fine < len(said)  # the test tells something
    assert (told["count"], told["correct"]) == (answered, correct)
    assert [level["count"] for level in told["levels"]] == [fine, answered - fine]
    assert found["levels"][0]["correct"] == found["correct"] and found["levels"][1]["groups"] == 2
    assert f"{told['coverage']:.1%} answered ({answered})" in printed


def test_without_a_taxonomy_it_is_the_label_or_unknown(sure, birds, capsys, tmp_path):
    folder, _, _, middle = sure
    predictor = glsim.Predictor(folder, reject=True)
    said = predictor(sorted((birds / "test").glob("*/*")))
    assert {a.verdict.level for a in said} == {"label", None}
    for a in said:
        known = a.probabilities[0] >= middle
        assert a.verdict == (a.labels[0] if known else "unknown", "label" if known else None, a.probabilities[0])
    measured = evaluate.evaluate_bundle(folder, birds, workers=0, reject=True)
    assert measured.answered.count == sum(a.verdict.level is not None for a in said)
    assert measured.levels is None
    for ending in ("text", "csv", "jsonl"):
        assert cli.main(["predict", str(folder), str(said[0].path), "--workers=0", "--reject", "--format", ending]) == 0
        assert said[0].verdict.label in capsys.readouterr().out
    assert glsim.Predictor(folder)(said[0].path)[0].verdict is None


def test_calibrate_finds_the_threshold_that_eval_and_predict_use(run_folder, birds, tmp_path, capsys):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    words = ["--data", str(birds), "--workers", "0"]
    assert cli.main(["eval", str(folder), *words, "--reject"]) == 2
    assert "this model has no threshold; glsim calibrate" in capsys.readouterr().err
    assert cli.main(["calibrate", str(folder), *words, "--split", "test", "--max-error", "80"]) == 0
    printed, found = capsys.readouterr().out, read_config(folder).calibration
    measured = evaluate.evaluate_bundle(folder, birds, workers=0, reject=True)
    assert measured.answered.count == found["answered"] > 0
    assert measured.answered.correct == found["answered_correct"]
    assert measured.answered.error <= 0.8 and measured.ece == pytest.approx(found["ece"][1], abs=1e-6)
    assert f"{found['coverage']:.1%} answered" in printed
    config = read_config(folder).as_dict()
    config["calibration"]["threshold"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(glsim.ConfigError, match="no threshold keeps the error of this model at 80 points"):
        glsim.Predictor(folder, reject=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["calibrate", "m", "--data", "d", "--max-error", "100"], "max_error=100.0: points of 100"),
        (["predict", "m", "a.png", "--taxonomy", "t.csv"], "add --reject"),
        (["predict", "m", "a.png", "--reject", "--engine", "ray", "--out", "o"], "glsim predict bulk --help lists"),
        (["explain", "m", "a.png", "--out", "o", "--contrast", "a", "a"], "two different classes"),
        (["explain", "m", "a.png", "--out", "o", "--contrast", "a", "b", "--metrics", "all"], "--metrics"),
        (["explain", "m", "a.png", "--out", "o", "--layers", "--contrast", "a", "b"], "--layers"),
        (["explain", "m", "a.png", "--out", "o", "--layers", "--metrics", "all"], "--metrics"),
        (["explain", "layers", "m", "a.png", "--out", "o", "--top-only", "3"], "--top-only"),
    ],
)
def test_settings_that_make_no_sense(words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
