"""The command line as a user meets it."""

import json
import subprocess
import sys
import time

import pytest
from conftest import TINY

from glsim import cli, config


def run(*words):
    return subprocess.run([sys.executable, "-m", "glsim.cli", *map(str, words)], capture_output=True, text=True)


def call(capsys, *words):
    code = cli.main([str(w) for w in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "usage: glsim VERB"),
        (["--version"], 0, "0.1.0"),
        ([], 2, "usage: glsim VERB"),
        (["trane"], 2, "unknown verb 'trane'; choose from: quickstart, train"),
        (["train", "--help"], 0, "--label-smoothing"),
        (["train", "--data", "d", "--out", "o", "--epoch", "3"], 2, "did you mean --epochs?"),
        (["train", "--data", "d", "--out", "o", "--lr", "fast"], 2, "lr"),
        (
            ["train", "--data", "d", "--out", "o", "--method", "x"],
            2,
            "unknown method 'x'; choose from: aftrans, cal, dcal",
        ),
        (["train", "--data", "d", "--out", "o", "--recipe", "none.yaml"], 2, "none.yaml"),
        (["train", "--out", "o"], 2, "required: data"),
        (["eval", "run"], 2, "required: data"),
        (["predict", "run"], 2, "required: images"),
        (["index"], 2, "unknown verb 'index'; choose from:"),
        (["index", "--help"], 0, "index query"),
        (["index", "add", "--help"], 0, "--label"),
        (["index", "build", "run", "--data", "d"], 2, "required: out"),
        (["index", "eval", "i", "--data", "d", "--shots", "0"], 2, "shots=[0]: one or more, at least 1"),
        (["predict", "run", "x", "--top-k", "0"], 2, "top_k=0: at least 1"),
        (["export", "run"], 2, "required: out"),
        (["export", "run", "--out", "model.bin"], 2, "name a file that ends in .onnx (format onnx) or .pt2"),
        (["push", "run", "name"], 2, "repository='name': owner/name is needed"),
        (["datasets"], 0, "synthetic"),
        (["datasets", "prepare"], 2, "glsim datasets prepare synthetic --root FOLDER"),
        (["datasets", "prepare", "owls", "--root", "x"], 2, "unknown data set 'owls'; choose from: aircraft, cars"),
    ],
)
def test_answers_and_exit_codes_without_torch(capsys, words, code, said):
    got, out, err = call(capsys, *words)
    assert (got, said in out + err) == (code, True), (out, err)
    assert "Traceback" not in err


def test_help_and_errors_do_not_import_torch():
    code = """
import sys
from glsim.cli import main
for words in (["--help"], ["train", "--help"], ["train", "--foo"], ["train", "--data=d", "--out=o", "--epochs=0"]):
    main(words)
assert "torch" not in sys.modules, "torch was imported"
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help_is_quick():
    """A guard against an import creeping in, far above the usual 0.1 s: not a measurement."""
    best = min(_seconds("--help") for _ in range(3))
    assert best < 2.0


def _seconds(*words):
    start = time.perf_counter()
    run(*words)
    return time.perf_counter() - start


def test_recipes_are_read_and_overridden(tmp_path):
    recipe = "data: d\nout: o\ntest: true\nlr: 1e-3\noptions: {top_o: 3}\nbackbone_args: {depth: 2}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    words = ["--recipe", str(tmp_path / "r.yaml"), "--epochs", "7", "--options.metric", "gls_l1", "--no-pretrained"]
    s = cli.parse("train", cli.VERBS["train"], words)
    assert s.test and not cli.parse("train", cli.VERBS["train"], [*words, "--no-test"]).test
    assert (s.lr, s.epochs, s.data, s.pretrained) == (1e-3, 7, "d", False)
    assert s.options == {"top_o": 3, "metric": "gls_l1"} and s.backbone_args == {"depth": 2}
    assert cli.parse(
        "train", cli.VERBS["train"], ["--data", "d", "--out", "o", "--image-size", "[96,128]"]
    ).image_size == [
        96,
        128,
    ]
    (tmp_path / "r.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(cli.ConfigError, match="learning_rate"):
        cli.parse("train", cli.VERBS["train"], ["--data", "d", "--out", "o", *words[:2]])


def test_every_verb_prints_one_json_document(capsys, run_folder, birds, tmp_path):
    image = next((birds / "test").rglob("*.jpg"))
    tiny = [f"--{k.replace('_', '-')}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in TINY.items()]
    tiny = [w for w in tiny if "pretrained" not in w] + ["--no-pretrained", "--epochs=1"]
    verbs = {
        "train": ["--data", birds, "--out", tmp_path / "r", *tiny],
        "eval": [run_folder, "--data", birds, "--workers", "0"],
        "predict": [run_folder, image, "--workers", "0"],
        "explain": [run_folder, image, "--out", tmp_path / "p"],
        "localize": [run_folder, "--images", birds / "test", "--masks", birds / "masks"],
        "datasets": [
            "prepare",
            "synthetic",
            "--root",
            tmp_path / "b",
            "--classes",
            "2",
            "--train",
            "1",
            "--test",
            "1",
            "--size",
            "64",
        ],
    }
    for verb, words in verbs.items():
        code, out, _ = call(capsys, verb, *words, "--json")
        assert code == 0
        assert isinstance(json.loads(out), dict), verb


def test_text_for_people(capsys, run_folder, birds, tmp_path):
    code, out, _ = call(capsys, "eval", run_folder, "--data", birds, "--workers", "0")
    assert code == 0 and "top-1" in out and "orange_beak" in out
    code, out, _ = call(capsys, "predict", run_folder, birds / "test", "--workers", "0", "--format", "csv")
    assert code == 0 and len(out.splitlines()) == 1 + 9 * 3
    code, out, _ = call(capsys, "explain", run_folder, birds / "test" / "orange_beak", "--out", tmp_path / "p")
    assert code == 0 and "sheet.png" not in out and str(tmp_path / "p") in out


def test_eval_says_when_it_drew_the_split(capsys, run_folder, birds):
    _, out, _ = call(capsys, "eval", run_folder, "--data", birds / "test", "--workers", "0")
    assert "has no splits of its own" in out and "--split all" in out
    _, out, _ = call(capsys, "eval", run_folder, "--data", birds / "test", "--workers", "0", "--split", "all")
    assert "has no splits of its own" not in out and "all: 9 images" in out


def test_bad_data_leaves_with_3(capsys, run_folder, tmp_path):
    assert call(capsys, "train", "--data", tmp_path / "none", "--out", tmp_path / "o", "--no-pretrained")[0] == 3
    assert call(capsys, "eval", run_folder, "--data", tmp_path / "none")[0] == 3
    code, _, err = call(capsys, "predict", run_folder, tmp_path / "none.jpg")
    assert code == 3 and "none.jpg" in err
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    code, _, err = call(capsys, "predict", run_folder, tmp_path / "bad.jpg", "--workers", "0")
    assert code == 3 and "bad.jpg: not an image" in err
    assert call(capsys, "explain", run_folder, tmp_path / "bad.jpg", "--out", tmp_path / "p")[0] == 3
    assert call(capsys, "convert", tmp_path / "none.pth", tmp_path / "b")[0] == 3
    assert call(capsys, "predict", tmp_path, tmp_path / "bad.jpg")[0] == 3
    code, out, _ = call(capsys, "predict", run_folder, tmp_path / "bad.jpg", "--workers", "0", "--json")
    assert json.loads(out) == {
        "error": f"{tmp_path / 'bad.jpg'}: not an image, or damaged at its start: b'no image'",
        "exit_code": 3,
    }


def test_an_out_that_cannot_be_written_is_one_sentence(capsys, run_folder, birds, tmp_path):
    (tmp_path / "file").write_text("")
    image = next((birds / "test").rglob("*.jpg"))
    for words in (
        ["quickstart", "--out", tmp_path / "file"],
        ["eval", run_folder, "--data", birds, "--workers", "0", "--out", tmp_path / "file"],
        ["predict", run_folder, image, "--workers", "0", "--out", tmp_path / "file" / "x.csv"],
    ):
        code, _, err = call(capsys, *words)
        assert code in (1, 2) and str(tmp_path) in err, err


def test_quickstart_end_to_end(capsys, tmp_path):
    out = tmp_path / "q"
    words = ["--epochs", "1", "--train", "2", "--test", "1", "--workers", "0"]
    code, text, _ = call(capsys, "quickstart", "--out", out, *words)
    assert code == 0
    assert "plain" in text and "crops that hold the part" in text and "report.html" in text
    page = (out / "report" / "report.html").read_text()
    pictures = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(pictures) == 5 and all((out / "report" / p).is_file() for p in pictures)
    assert call(capsys, "quickstart", "--out", out, *words)[0] == 2  # never into a folder that holds something


@pytest.mark.parametrize(
    ("splits", "dataset", "hint"),
    [
        (["train", "test"], None, "next: glsim eval r --data d"),
        (["train", "test"], "cars", "next: glsim eval r --data d --dataset cars"),
        (["train", "val"], None, None),  # nothing to measure on
    ],
)
def test_train_says_how_to_measure_test(splits, dataset, hint):
    done = {"epoch": 1, "train_loss": 1.0, "images_per_second": 1.0, "skipped": [], "out": "r", "splits": splits}
    done["batch_size"] = 8
    s = config.Train(data="d", out="r", dataset=dataset)
    last = cli.show_train(done, s).splitlines()[-1]
    assert last == hint if hint else last.startswith("bundle: r")
    assert "next:" not in cli.show_train({**done, "test": {"top1": 0.5, "correct": 1, "count": 2}}, s)
