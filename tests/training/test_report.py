"""Tables of runs against numbers worked out by hand or by scipy; what cannot be compared is refused by name."""

import csv
import io
import json
import statistics

import pytest
import yaml
from conftest import TINY
from PIL import Image
from scipy.stats import binomtest

from glsim import ConfigError, DataError, cli
from glsim.training import report
from glsim.training.config import Train, to_recipe


def make_run(folder, right, *, data="birds", images=10, split="ab" * 32, seed=1, labels="ab", **changes):
    """A finished run as training leaves it: `right` are the numbers of the test images it gets right."""
    s = Train(data=f"/data/{data}", out=str(folder), seed=seed, **{**TINY, **changes})
    folder.mkdir(parents=True)
    (folder / "train.yaml").write_text(to_recipe(s))
    (folder / "config.json").write_text(json.dumps({"data": {"source": data, "split_hash": split}}))
    test = {"count": images, "correct": len(right), "top1": len(right) / images, "per_class_mean": len(right) / images}
    (folder / "metrics.json").write_text(json.dumps({"epoch": s.epochs, "test": test}))
    rows = ["path,label,prediction,confidence"]
    for i in range(images):
        truth = labels[i % len(labels)]
        rows.append(f"test/{i}.jpg,{truth},{truth if i in right else '?'},0.5")
    (folder / "predictions_test.csv").write_text("\n".join(rows) + "\n")
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """`plain` and `glsim`, two seeds each, on the same ten images."""
    made = [make_run(tmp_path / f"p{seed}", range(5), seed=seed, method="plain", options={}) for seed in (1, 10)]
    return [*made, *(make_run(tmp_path / f"g{seed}", range(2, last), seed=seed) for seed, last in ((1, 10), (10, 9)))]


def test_mean_std_and_counts_of_runs_that_differ_in_the_seed(runs):
    (data,) = report.report_runs(runs).data
    plain, glsim = data.rows
    assert (data.name, plain.method, glsim.method) == ("birds", "plain", "glsim")
    assert glsim.seeds == [1, 10] and glsim.correct == [8, 7] and glsim.count == 10
    assert glsim.top1 == (pytest.approx(0.75), pytest.approx(statistics.stdev([0.8, 0.7])))
    assert plain.top1 == (0.5, 0.0)
    assert not data.comparisons


def test_one_run_has_no_std(tmp_path):
    r = report.report_runs([make_run(tmp_path / "a", range(3))])
    assert r.data[0].rows[0].top1 == (0.3, None)
    assert "| 30.00 | 30.00 | 3 of 10 |" in report.as_markdown(r)


def test_other_settings_are_other_rows_and_the_table_says_which(tmp_path):
    made = [make_run(tmp_path / "a", range(3)), make_run(tmp_path / "b", range(4), epochs=9, workers=3)]
    made.append(make_run(tmp_path / "c", range(5), lr=0.5))
    (data,) = report.report_runs(made).data
    assert [row.settings for row in data.rows] == [{"epochs": 2}, {"epochs": 9}, {"epochs": 2}]
    assert report.label(data.rows) == [
        "glsim, lr 0.001, epochs=2",
        "glsim, lr 0.001, epochs=9",
        "glsim, lr 0.5, epochs=2",
    ]


def test_every_data_set_has_its_table_and_other_splits_are_other_rows(tmp_path):
    made = [make_run(tmp_path / "a", range(3)), make_run(tmp_path / "b", range(4), data="flowers")]
    made.append(make_run(tmp_path / "c", range(4), split="cd" * 32, seed=10))
    r = report.report_runs(made)
    assert [data.name for data in r.data] == ["birds", "flowers"]
    assert [row.settings for row in r.data[0].rows] == [{"split": "abababab"}, {"split": "cdcdcdcd"}]


def test_pairs_are_counted_image_by_image_seed_by_seed(runs):
    (data,) = report.report_runs(runs, against="plain").data
    (pair,) = data.comparisons
    assert (pair.baseline, pair.other) == ("plain", "glsim")
    # plain: images 0 to 4; glsim: 2 to 9, then 2 to 8.
    assert [(x.seed, x.only_baseline, x.only_other) for x in pair.rows] == [
        ("1", 2, 5),
        ("10", 2, 4),
        ("pooled", 4, 9),
    ]
    assert pair.rows[2].p == pytest.approx(binomtest(4, 13).pvalue) and pair.rows[2].images == 20


def test_the_baseline_may_be_a_folder_and_single_runs_pair_whatever_their_seeds(tmp_path):
    a, b = make_run(tmp_path / "a", range(3), seed=1), make_run(tmp_path / "b", range(1, 9), seed=2, lr=0.5)
    (pair,) = report.report_runs([a, b], against=b).data[0].comparisons
    assert (pair.rows[0].seed, pair.rows[0].only_baseline, pair.rows[0].only_other) == ("2, 1", 6, 1)
    assert pair.other == "glsim, lr 0.001"
    with pytest.raises(ConfigError, match="against=glsim stands in 2 rows; name one of these folders: .*a, .*b"):
        report.report_runs([a, b], against="glsim")
    with pytest.raises(ConfigError, match="against=cal: no run of that method or folder; methods here: glsim"):
        report.report_runs([a, b], against="cal")


def test_what_cannot_be_paired_is_refused_by_name(tmp_path):
    a = make_run(tmp_path / "a", range(3), method="plain", options={})
    b = make_run(tmp_path / "b", range(3), images=9)
    with pytest.raises(DataError, match="a and .*b were measured on other images or labels; they cannot be paired"):
        report.report_runs([a, b], against="plain")
    c = make_run(tmp_path / "c", range(3), labels="ba")
    with pytest.raises(DataError, match="a and .*c were measured on other images or labels"):
        report.report_runs([a, c], against="plain")
    d, e = (make_run(tmp_path / f"d{seed}", range(3), seed=seed) for seed in (2, 3))
    with pytest.raises(ConfigError, match="a and .*d2 belong to groups without a seed in common"):
        report.report_runs([a, d, e], against="plain")


def test_predictions_must_be_there_and_agree_with_the_metrics(tmp_path):
    a, b = make_run(tmp_path / "a", range(3), method="plain", options={}), make_run(tmp_path / "b", range(3))
    file = tmp_path / "b" / "predictions_test.csv"
    file.write_text(file.read_text().replace("?", "b", 1))
    with pytest.raises(DataError, match=r"predictions_test.csv has 4 of 10 images right, metrics.json .* 3 of 10"):
        report.report_runs([a, b], against="plain")
    file.write_text("path,label\n")
    with pytest.raises(DataError, match="has 0 of 0 images right"):
        report.report_runs([a, b], against="plain")
    file.unlink()
    with pytest.raises(DataError, match="b has no predictions_test.csv: it was trained by an earlier glsim"):
        report.report_runs([a, b], against="plain")
    assert report.report_runs([a, b]).data  # only pairs need them


def test_folders_of_reproduce_and_globs_are_opened(tmp_path):
    for seed in (1, 10):
        make_run(tmp_path / "r" / f"seed_{seed}", range(4 + seed), images=20, seed=seed)
    make_run(tmp_path / "r" / "lr_0.1", range(9), lr=0.1)  # chose the lr, is no result
    state = {"runs": {"lr_0.1": {}, "seed_1": {}, "seed_10": {}}}
    (tmp_path / "r" / "reproduce.json").write_text(json.dumps(state))
    for given in (
        [str(tmp_path / "r")],
        [str(tmp_path / "r" / "seed_*")],
        [str(tmp_path / "r"), str(tmp_path / "r" / "seed_1")],
    ):
        ((row,),) = (data.rows for data in report.report_runs(given).data)
        assert row.correct == [5, 14]


def test_unfinished_runs_are_left_out_and_listed(tmp_path):
    a = make_run(tmp_path / "a", range(4))
    b = make_run(tmp_path / "b", range(4), seed=10)
    (tmp_path / "b" / "metrics.json").write_text(json.dumps({"epoch": 1}))
    (tmp_path / "notes").mkdir()
    r = report.report_runs([a, b, str(tmp_path / "notes")])
    assert r.data[0].rows[0].seeds == [1] and len(r.left_out) == 2
    text = report.as_markdown(r)
    assert "b: not measured on test (not finished" in text and "notes: no run" in text
    with pytest.raises(DataError, match=r"no finished run; left out: .*b: not measured on test"):
        report.report_runs([b])
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        report.report_runs([str(tmp_path / "nowhere")])


def test_twice_the_same_run_is_no_second_seed(tmp_path):
    a, b = (make_run(tmp_path / name, range(4)) for name in "ab")
    assert report.report_runs([a, a]).data[0].rows[0].seeds == [1]
    with pytest.raises(DataError, match="a and .*b have the same seed and settings; give one of them"):
        report.report_runs([a, b])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("config.json", text) for text in ("[]", "{}", '{"data": 1}', '{"data": {"source": 1, "split_hash": 2}}')),
        *(("metrics.json", text) for text in ("[]", '{"test": []}', '{"test": {"correct": "x"}}', '{"test": NaN}')),
        *(("reproduce.json", text) for text in ("", "[]", "{}", '{"runs": []}')),
    ],
)
def test_a_file_that_holds_something_else_is_named(tmp_path, name, content):
    make_run(tmp_path / "a", range(4))
    (tmp_path / "a" / name).write_text(content)
    with pytest.raises(DataError, match=f"a.* is damaged.*|{name}"):
        report.report_runs([str(tmp_path / "a")])


def test_damaged_files_are_named(tmp_path):
    a = make_run(tmp_path / "a", range(4))
    (tmp_path / "a" / "metrics.json").write_text("{")
    with pytest.raises(DataError, match="metrics.json is damaged"):
        report.report_runs([a])
    (tmp_path / "a" / "train.yaml").write_text(yaml.safe_dump({"lrate": 1}))
    with pytest.raises(ConfigError, match="train.yaml: unknown lrate"):
        report.report_runs([a])


def test_written_files_hold_what_is_printed(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["report", *runs, "--against", "plain", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (out / "report.md").read_text().rstrip("\n") + f"\n\nwritten: {out}\n" == printed
    assert "| glsim | vit_tiny_patch16_224 | 0.001 | 1, 10 | 75.00 +- 7.07 | 75.00 +- 7.07 | 8, 7 of 10 |" in printed
    assert "### Against plain" in printed and "| glsim | pooled | 9 | 4 | 0.267 |" in printed
    table = list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))
    assert [row["method"] for row in table] == ["plain", "glsim"]
    assert (table[1]["data"], float(table[1]["top1_mean"]), table[1]["correct"]) == ("birds", 0.75, "8 7")
    with Image.open(out / "report.png") as picture:
        assert picture.width > 800
    assert sorted(p.name for p in out.iterdir()) == [".glsim", "report.csv", "report.md", "report.png"]
    assert cli.main(["report", *runs, "--against", "plain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"][0]["comparisons"][0]["rows"][-1]["only_other"] == 9
