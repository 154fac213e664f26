"""The command line as a user meets it."""

import dataclasses
import errno
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import typing
import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest
from conftest import ROOT, TINY, choices, parsed

from glsim import cli
from glsim.cli import train as train_verb
from glsim.cli.parser import in_order
from glsim.data.catalog import SETS
from glsim.models import METHODS
from glsim.settings import outputs
from glsim.training.config import Train, change_recipe
from glsim.types import ConfigError, DataError, DataWarning

LOAD_VERB = cli.load_verb


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
        (["trane"], 2, f"unknown verb 'trane'; {choices(cli.verb_names())}\n"),
        (["train", "--help"], 0, "--label-smoothing"),
        (["train", "--data", "d", "--out", "o", "--epoch", "3"], 2, "did you mean --epochs?"),
        (["train", "--data", "d", "--out", "o", "--lr", "fast"], 2, "lr"),
        (["train", "--data", "d", "--out", "o", "--method", "x"], 2, f"unknown method 'x'; {choices(METHODS)}\n"),
        (["train", "--data", "d", "--out", "o", "--recipe", "none.yaml"], 2, "none.yaml"),
        (["train", "--out", "o"], 2, "required: data"),
        (["eval", "run"], 2, "required: data"),
        (["predict", "run"], 2, "required: images"),
        (["index"], 2, "unknown verb 'index'; choose from:"),
        (["index", "--help"], 0, "index query"),
        (["index", "add", "--help"], 0, "--label"),
        (["index", "build", "run", "--data", "d"], 2, "required: out"),
        (["index", "query", "i", "x", "--top-k", "0"], 2, "top_k=0: at least 1"),
        (["predict", "run", "x", "--top-k", "0"], 2, "top_k=0: at least 1"),
        (["export", "run"], 2, "required: out"),
        (["export", "run", "--out", "model.bin"], 2, "name a file that ends in .onnx (format onnx) or .pt2"),
        (["push", "run", "name"], 2, "repository='name': owner/name is needed"),
        (["datasets"], 0, "synthetic"),
        (["datasets", "prepare"], 2, "glsim datasets prepare synthetic --root FOLDER"),
        (
            ["datasets", "prepare", "owls", "--root", "x"],
            2,
            f"unknown data set 'owls'; {choices(['synthetic', *SETS])}",
        ),
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
    s = parsed("train", words)
    assert s.test and not parsed("train", [*words, "--no-test"]).test
    assert (s.lr, s.epochs, s.data, s.pretrained) == (1e-3, 7, "d", False)
    assert s.options == {"top_o": 3, "metric": "gls_l1"} and s.backbone_args == {"depth": 2}
    assert parsed("train", ["--data", "d", "--out", "o", "--image-size", "[96,128]"]).image_size == [
        96,
        128,
    ]
    (tmp_path / "r.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(cli.ConfigError, match="learning_rate"):
        parsed("train", ["--data", "d", "--out", "o", *words[:2]])


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


@pytest.mark.parametrize(
    ("splits", "dataset", "hint"),
    [
        (["train", "test"], None, "next: glsim eval r --data d"),
        (["train", "test"], "cars", "next: glsim eval r --data d --dataset cars"),
        (["train", "val"], None, None),  # nothing to measure on
    ],
)
def test_train_says_how_to_measure_test(splits, dataset, hint):
    done = trained(splits=splits)
    s = Train(data="d", out="r", dataset=dataset)
    *_, last = train_verb.show(done, s)
    assert last == hint if hint else last.startswith("bundle: r")
    measured = types.SimpleNamespace(top1=0.5, correct=1, count=2)
    assert "next:" not in "\n".join(train_verb.show(dataclasses.replace(done, test=measured), s))


def trained(**changes):
    """What a run of one epoch returns."""
    from glsim.training.train import TrainedRun

    epoch = dict(epoch=1, step=3, lr=0.1, train_loss=1.0, train_top1=0.5, images_per_second=1.0, seconds=1.0)
    return TrainedRun(**{**epoch, "out": "r", "batch_size": 8, "splits": ["train"], "skipped": [], **changes})


# --- whatever goes wrong: a sentence, a status, and with --json one document ------------------------------------------

CODES = {0, 1, 2, 3, 4, 130}
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
GIVEN = {"repository": "owner/name", "action": "prepare", "name": "synthetic"}  # what is no path


def settings(chosen):
    """The settings of all verbs that `chosen` takes by their field and type: verb, name and role."""
    return [
        pytest.param(name, f.name, f.metadata.get("path"), id=f"{name} {f.name}")
        for name in cli.verb_names()
        for f in dataclasses.fields(cli.load_verb(name).options)
        if chosen(f, typing.get_type_hints(cli.load_verb(name).options)[f.name])
    ]


def words_of(name, folder, **values):
    """Words with which a verb passes its checks: what it reads is not there, what it writes is below `folder`."""
    words, needed = name.split(), []
    for f in in_order(LOAD_VERB(name).options):
        role = f.metadata.get("path")
        value = {"reads": folder / "none", "file": folder / "out.onnx", "folder": folder / "out"}.get(role)
        mandatory = (f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING) or f.name == "root"
        value = values.pop(f.name, GIVEN.get(f.name, value if mandatory else None))
        if value is not None and f.metadata.get("positional"):
            words.append(str(value))
        elif value is not None and (role or f.name == "root"):
            needed.append(f"--{f.name.replace('_', '-')}={value}")
    assert not values
    return [*words, *needed, *(["--classes", "a", "b"] if name == "explain contrast" else [])]


def document(capsys, words):
    """Status, document and stderr of a call with --json, held to what every call has to keep."""
    code, out, err = call(capsys, *words, "--json")
    assert out.count("\n") == 1 and out.endswith("\n"), out
    told = json.loads(out)
    assert isinstance(told, dict) and code in CODES
    if "error" in told:
        assert set(told) == {"error", "exit_code"} and told["exit_code"] == code != 0
        assert told["error"].strip() and len(told["error"]) < 5000
    assert "Traceback" not in err and not CONTROLS.search(err)
    return code, told, err


def put_in_place_of_verbs(monkeypatch, does):
    """`does` runs in the place of every verb."""

    monkeypatch.setattr(cli, "load_verb", lambda name: LOAD_VERB(name)._replace(run=lambda options, progress: does()))


def raiser(error):
    def does():
        raise error

    return does


def out_of_memory():
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee the docs")


def allocate():
    import torch

    torch.empty(2**60, dtype=torch.uint8)


def compile_without_compiler():
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        raise InvalidCxxCompiler
    except Exception as error:
        raise RuntimeError("inside a backend") from error


def interrupted_import():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("numpy._core.multiarray failed to import") from error


def exhaust():
    return exhaust() + 1


class WorkerError(DataError):
    pass


WORKER = "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n{0}: {1}"
FAULTS = {
    "memory": (raiser(MemoryError()), 1, "memory has run out"),
    "device memory": (out_of_memory, 1, "CUDA out of memory. Tried to allocate 20.00 MiB.; "),
    "allocator": (allocate, 1, "memory has run out"),
    "no memory for a process": (raiser(OSError(errno.ENOMEM, "Cannot allocate memory")), 1, "memory has run out"),
    "killed worker": (raiser(RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. ")), 1, "has died"),
    "dead worker": (raiser(RuntimeError("DataLoader worker (pid(s) 3) exited unexpectedly")), 1, "has died"),
    "shared memory": (raiser(RuntimeError("unable to mmap 8 bytes from file </torch_1>")), 1, "memory has run out"),
    "worker's error": (raiser(WorkerError(WORKER.format("WorkerError", "x.jpg: no image"))), 3, "x.jpg: no image"),
    "worker's other error": (raiser(KeyError(WORKER.format("KeyError", "'y'"))), 1, "internal error: KeyError: 'y'"),
    "compiler": (compile_without_compiler, 1, "leave out --compile"),
    "batch norm": (raiser(ValueError("Expected more than 1 value per channel when training, got 1")), 1, "batch norm"),
    "full disk": (raiser(OSError(errno.ENOSPC, "No space left on device", "a\nb")), 1, "No space left on device"),
    "encoding": (lambda: b"\xff".decode(), 3, "another encoding than UTF-8"),
    "recursion": (exhaust, 1, "nested too deeply"),
    "interrupt": (raiser(KeyboardInterrupt()), 130, "interrupted"),
    "interrupted import": (interrupted_import, 130, "interrupted"),
    "library that exits": (raiser(SystemExit(3)), 1, "ended the program"),
    "missing library": (raiser(ImportError("libGL.so.1: cannot open")), 1, "libGL.so.1"),
    "pipe": (raiser(BrokenPipeError(errno.EPIPE, "Broken pipe")), 1, "Broken pipe"),
    "unforeseen": (lambda: {}["x"], 1, "internal error: KeyError: 'x'; please report it"),
    "nothing said": (raiser(AssertionError()), 1, "internal error: AssertionError"),
    "controls": (raiser(DataError("a\x1b[31m\nb\u202e.jpg is bad")), 3, "a\x1b[31m\nb\u202e.jpg is bad"),
    "details": (raiser(ConfigError("first:", details=["a\x1b", "b\nc"])), 2, "first:\n  a\x1b\n  b\nc"),
    "names without end": (raiser(DataError(", ".join(map(str, range(500_000))))), 3, "characters left out"),
    "lines without end": (raiser(DataError("bad:", details=range(500_000))), 3, ".. and 499,950 more"),
    "long error of a library": (raiser(ValueError("x" * 10**6)), 1, "more characters"),
    "verb that breaks off": (lambda: None, 1, "internal error"),
}


@pytest.mark.parametrize("name", cli.verb_names())
def test_every_verb_tells_every_fault(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    settings = parsed(name, words_of(name, tmp_path)[len(name.split()) :])
    monkeypatch.setattr(cli, "parse", lambda *_: settings)  # the same every time, and slow
    for fault, (does, code, said) in FAULTS.items():
        put_in_place_of_verbs(monkeypatch, does)
        got, told, err = document(capsys, words_of(name, tmp_path))
        assert (got, said in told["error"]) == (code, True), (fault, told)
        assert err.startswith(f"glsim {name}: "), fault


@pytest.mark.parametrize("name", cli.verb_names())
def test_every_verb_prints_its_document_and_nothing_else(capsys, tmp_path, monkeypatch, name):
    def noisy():
        sys.stdout.write("downloading..\n")
        warnings.warn("3 files were left out\x1b[2J", DataWarning, stacklevel=1)
        warnings.warn("3 files were left out\x1b[2J", DataWarning, stacklevel=1)
        return {"value": float("nan"), "name": "a\x1b\nb"}

    put_in_place_of_verbs(monkeypatch, noisy)
    code, told, err = document(capsys, words_of(name, tmp_path))
    assert code == 0
    assert told == {"value": None, "name": "a\x1b\nb", "notes": ["3 files were left out\x1b[2J"]}
    assert err == f"downloading..\nglsim {name}: note: 3 files were left out\\x1b[2J\n"


@pytest.mark.parametrize("name", cli.verb_names())
def test_every_verb_tells_wrong_words(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    put_in_place_of_verbs(monkeypatch, raiser(AssertionError("the verb was run")))
    good = words_of(name, tmp_path)
    for words in ([*good, "--no-such-option", "3"], [*good, "--a\x1b\nb"], [*good, "--x\udcff=y"], [*good, "--json=1"]):
        code, told, _ = document(capsys, words)
        assert code == 2 and "\n" not in told["error"], told


@pytest.mark.parametrize(
    ("name", "option", "role"), settings(lambda f, _: f.metadata.get("path") in ("file", "folder"))
)
def test_what_cannot_be_written_is_told_before_the_work(capsys, tmp_path, monkeypatch, name, option, role):
    put_in_place_of_verbs(monkeypatch, raiser(AssertionError("the verb was run")))
    (tmp_path / "file.onnx").write_text("")
    (tmp_path / "folder.onnx").mkdir()
    os.mkfifo(tmp_path / "fifo.onnx")
    (tmp_path / "link.onnx").symlink_to(tmp_path / "gone")
    wrong = ["file.onnx" if role == "folder" else "folder.onnx", "file.onnx/new/a.onnx", "fifo.onnx", "link.onnx"]
    before = sorted(tmp_path.iterdir())
    for place in [*(tmp_path / name for name in wrong), Path("/proc/new/a.onnx"), tmp_path / ("x" * 300 + ".onnx")]:
        code, told, _ = document(capsys, words_of(name, tmp_path, **{option: place}))
        assert code in (1, 2) and f"{option}={place}" in told["error"], told
    assert sorted(tmp_path.iterdir()) == before
    put_in_place_of_verbs(monkeypatch, lambda: {"fine": True})
    assert document(capsys, words_of(name, tmp_path, **{option: tmp_path / "new" / "a.onnx"}))[1] == {"fine": True}
    assert sorted(tmp_path.iterdir()) == before  # looking makes nothing


READERS = settings(
    lambda f, hint: f.metadata.get("path") == "reads" and f.default is f.default_factory is dataclasses.MISSING
)


@pytest.mark.parametrize("name", sorted({row.values[0] for row in READERS}))
def test_every_verb_tells_what_is_missing(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, told, _ = document(capsys, words_of(name, tmp_path))
    assert code in (1, 2, 3) and "internal error" not in told["error"], told
    assert str(tmp_path) in told["error"] or "glsim[" in told["error"]  # or a library of an extra


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "RUN", "SET/test", "--skip-bad", "--workers", "0"],
        pytest.param(["explain", "RUN", "SET/test", "--skip-bad", "--out", "SET/new/pictures"], marks=pytest.mark.slow),
        ["localize", "RUN", "--images", "SET/test", "--masks", "SET/masks/part", "--skip-bad"],
        ["eval", "RUN", "--data", "SET", "--skip-bad", "--workers", "0"],
        ["index", "build", "RUN", "--data", "SET", "--split", "test", "--skip-bad", "--workers", "0", "--out", "SET/i"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_links_that_lead_nowhere_are_left_out_by_name(capsys, run_folder, birds, tmp_path, words):
    """Back to itself, or to what is gone."""
    data = Path(shutil.copytree(birds, tmp_path / "birds"))
    inside = sorted((data / "test").iterdir())[0]
    for name in ("loop.jpg", "gone.jpg"):
        (inside / name).symlink_to("loop.jpg" if name == "loop.jpg" else "nowhere")
        mask = data / "masks" / "part" / "test" / inside.name / name
        shutil.copy(next(mask.parent.glob("*.png")), mask.with_suffix(".png"))
    places = {"RUN": str(run_folder), "SET": str(data)}
    for key, place in places.items():
        words = [word.replace(key, place) for word in words]
    code, told, _ = document(capsys, words)
    assert code == 0, told
    assert [Path(line.partition(": ")[0]).name for line in sorted(told["skipped"])] == ["gone.jpg", "loop.jpg"]


def test_an_answer_that_goes_nowhere_is_a_failure(capsys, monkeypatch):
    """As `glsim flops >&-` in a shell: Python then has no stdout."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["--version"]) == 1
    sys.stdout.close()
    assert "standard output is closed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--data", "d", "--out", "o", "--min-lr", ".nan"], "min_lr=nan: finite numbers are needed"),
        (["train", "--data", "d", "--out", "o", "--lr", "1e400"], "lr=inf: finite numbers are needed"),
        (["train", "--data", "d", "--out", "o", "--options.drop_path", ".nan"], "finite numbers are needed"),
        (["explain", "r", "x", "--out", "o", "--power", ".inf"], "power=inf: finite numbers are needed"),
        (["predict", "r", "x", "--max-megapixels", ".inf"], "max_megapixels=inf: finite numbers are needed"),
        (["explain", "r", "x", "--out", ""], "out='': the path of a folder or file is needed"),
        (["predict", "r", "x", "--out", " "], "out=' ': the path of a file is needed"),
        (["eval", "r", "--data", "d", "--out", "~nosuchuser/x"], "out=~nosuchuser/x: there is no such user"),
    ],
)
def test_values_that_are_none_are_refused(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, told, _ = document(capsys, words)
    assert code == 2 and said in told["error"], told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [[], ["trane"], ["index"], ["tr\x1b\nane"]])
def test_no_verb_is_a_document_too(capsys, words):
    code, told, _ = document(capsys, words)
    assert code == 2 and "train" in told["error"]
    assert call(capsys, "--json", *words)[1] == json.dumps(told) + "\n"  # before the verb or behind it


def test_the_traceback_is_shown_when_asked_for(capsys, monkeypatch):
    put_in_place_of_verbs(monkeypatch, lambda: {}["x"])
    for words in (["flops", "--traceback", "--json"], ["--traceback", "flops", "--json"]):
        code, out, err = call(capsys, *words)
        assert code == 1 and json.loads(out)["exit_code"] == 1
        assert "Traceback (most recent call last)" in err and "KeyError: 'x'" in err
    monkeypatch.setenv("GLSIM_TRACEBACK", "1")
    assert "Traceback" in call(capsys, "flops")[2]


def test_memory_names_the_settings_to_lower(capsys, monkeypatch):
    put_in_place_of_verbs(monkeypatch, raiser(MemoryError()))
    words = ["train", "--data", "d", "--out", "o", "--batch-size", "64", "--workers", "0"]
    assert "lower --batch-size (now 64) or --image-size\n" in call(capsys, *words)[2]
    assert "lower --batch-size (now 32) or --workers (now 2)\n" in call(capsys, "predict", "r", "x")[2]


def test_a_killed_loading_process_is_told(capsys, run_folder, birds, monkeypatch):
    from glsim.data.loaders import ImageDataset

    def die(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ImageDataset, "__getitem__", die)
    words = ["predict", run_folder, birds / "test", "--workers", "1"]
    code, told, _ = document(capsys, words)
    assert (
        code == 1 and "a process that loads images has died" in told["error"] and "--workers (now 1)" in told["error"]
    )


def test_batch_norm_of_one_value_is_told(capsys, birds, tmp_path):
    words = ["--method=plain", "--backbone=resnet18", "--backbone-args.layers=[1,1,1,1]", "--no-pretrained"]
    words += ["--image-size=32", "--batch-size=1", "--epochs=1", "--workers=0"]
    code, told, _ = document(capsys, ["train", "--data", birds, "--out", tmp_path / "r", *words])
    assert code == 2 and "batch" in told["error"] and "internal" not in told["error"]


def test_the_page_of_errors_quotes_what_is_said():
    rows = [
        line.split(" | ") for line in (ROOT / "docs" / "errors.md").read_text().splitlines() if line.count(" | ") == 2
    ]
    quoted = [found for row in rows for found in re.findall("`([^`]+)`", row[1])]
    source = "".join(path.read_text() for path in sorted((ROOT / "glsim").rglob("*.py")))
    said = source + "No space left on device"  # the system
    assert len(quoted) > 10 and not [text for text in quoted if text not in said]


CALLS = {name: import_module(f"glsim.cli.{name.replace(' ', '_')}") for name in cli.verb_names()}


@pytest.mark.parametrize("name", [name for name, module in CALLS.items() if hasattr(module, "CALL")])
def test_the_library_takes_the_options_of_a_verb_and_returns_what_it_shows(name):
    module, function = CALLS[name], resolve_name(CALLS[name].CALL)
    taken, shown = inspect.signature(function), inspect.signature(module.show)
    assert {f.name for f in dataclasses.fields(module.Options)} <= cli.keywords_of(function)
    assert taken.return_annotation == shown.parameters["r"].annotation


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("as_json", [True, False])
def test_what_the_encoding_cannot_say_is_escaped(monkeypatch, encoding, as_json):
    label = "\u83d6\u84b2 \u00e9 \x96\U0001f426 \udcff"

    def does():
        warnings.warn(label, DataWarning, stacklevel=1)
        return trained(out=label)

    put_in_place_of_verbs(monkeypatch, does)
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert cli.main(["train", "--data", "d", "--out", "o", *["--json"] * as_json]) == 0
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    if as_json:
        told = json.loads(out)
        assert told["out"] == label and told["notes"] == [label]
    else:
        flower = label[:2] if encoding == "utf-8" else r"\u83d6\u84b2"
        assert flower in out and flower in err and r"\udcff" in out and r"\x96" in out
        assert len(out.splitlines()) == 2


def test_a_reader_that_leaves_is_no_error():
    code = "import os, sys; os.close(0); from glsim.cli import main; sys.exit(main())"
    for words in (["--help"], ["train", "--help"], ["datasets"], ["trane", "--json"]):
        reading, writing = os.pipe()
        os.close(reading)
        child = subprocess.run([sys.executable, "-c", code, *words], stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        assert child.returncode in CODES
        assert "Traceback" not in child.stderr and "Exception ignored" not in child.stderr
        assert not child.stderr or child.stderr.startswith("glsim: unknown verb")


def test_libraries_that_print_do_not_reach_the_document():
    """Past Python too: a C library, a child process, who kept the stream."""
    code = """
import os, subprocess, sys
from glsim import cli
kept = sys.stdout
def run(options, progress):
    print("noise")
    kept.write("noise\\n")
    os.write(1, b"noise\\n")
    subprocess.run(["echo", "noise"], check=True)
    return {"a": "\u00e9"}
verb = cli.load_verb("flops")
cli.load_verb = lambda name: verb._replace(run=run)
sys.exit(cli.main(["flops", "--json"]))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert (child.returncode, child.stdout) == (0, '{"a": "\u00e9"}\n')
    assert child.stderr.count("noise") == 4


# --- settings ---------------------------------------------------------------------------------------------------------

WORDS = ["null", "~x", "007", "1e3", "[a]", "true", "{a: 1}", "#x", "a: b", "2020-01-01", "- a"]


NEEDS = {"taxonomy": ["--reject"], "place": ["--only=places.csv"]}
CHECKED = {"method", "backbone", "dataset", "optimizer", "augment", "crop", "against", "out", "repository"}
TEXTS = settings(
    lambda f, hint: hint in (str, str | None) and f.name not in CHECKED and not f.metadata.get("positional")
)


@pytest.mark.parametrize(("name", "option", "role"), TEXTS)
def test_text_is_never_yaml(tmp_path, name, option, role):
    words = [word for word in words_of(name, tmp_path)[len(name.split()) :] if not word.startswith(f"--{option}=")]
    given = []
    for word in WORDS:
        try:
            option_word = f"--{option.replace('_', '-')}={word}"
            s = parsed(name, [*words, *NEEDS.get(option, []), option_word])
        except ConfigError as error:  # a check of its own, of the text as it was typed
            assert "Expected a" not in str(error) and f"{option}=" in str(error)
            continue
        assert getattr(s, option) == word
        given.append(word)
    assert "007" in given


def test_lists_of_texts_are_never_yaml():
    s = parsed("explain contrast", ["r", *WORDS, "--out", "123", "--classes", "null", "1e3"])
    assert (s.images, s.out, s.classes) == (WORDS, "123", ["null", "1e3"])
    s = parsed("predict", ["r", "x", "--options.margin", "null"])
    assert s.options == {"margin": None}  # values of options are YAML


@pytest.mark.parametrize(
    "line", ["out: 123", "data: true", "data: 007", "init_from: 1.5", "out: [a]", "augment: 2020-01-01"]
)
def test_a_recipe_says_text_between_quotes(tmp_path, line):
    name, _, value = line.partition(": ")
    (tmp_path / "r.yaml").write_text(f"{line}\n")
    words = ["--recipe", str(tmp_path / "r.yaml"), "--data=d", "--out=o"]
    with pytest.raises(ConfigError, match=f"r.yaml: {name}: .* is no text in YAML; put it between quotes"):
        parsed("train", words)
    with pytest.raises(ConfigError, match="between quotes"):
        change_recipe(tmp_path / "r.yaml", {}, data="d", out="o")
    (tmp_path / "r.yaml").write_text(f"{name}: '{value}'\ndata_licence: null\n")
    s = change_recipe(tmp_path / "r.yaml", {}, **{"data": "d", "out": "o"} | {name: value})
    assert getattr(s, name) == value and s.data_licence is None


@pytest.mark.parametrize("text", ["a: [", "[" * 5000, "\x00", "a: !!python/name:os.system", "- a", "a: *b"])
def test_a_recipe_that_is_none_is_one_sentence(capsys, tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    code, told, _ = document(capsys, ["train", "--data=d", "--out", tmp_path / "o", "--recipe", tmp_path / "r.yaml"])
    assert code == 2 and "r.yaml" in told["error"] and "\n" not in told["error"]


@pytest.mark.parametrize(("name", "option", "role"), settings(lambda f, _: f.metadata.get("path")))
def test_the_home_folder_in_every_path(tmp_path, monkeypatch, name, option, role):
    monkeypatch.setenv("HOME", str(tmp_path))
    extra = ["--sources=~/x.onnx"] if (name, option) == ("bench", "against") else NEEDS.get(option, [])
    words = [*words_of(name, Path("/d"), **{option: "~/x.onnx"})[len(name.split()) :], *extra]
    s = parsed(name, words)
    home = f"{tmp_path}/x.onnx"
    assert getattr(s, option) in (home, [home])


def test_every_setting_that_names_a_file_is_a_path():
    named = re.compile(r"\b(folder|file|bundle|CSV|recipe|\.pth|glob)\b")
    others = {"repository", "format", "label", "data_licence", "backbone_licence"}
    for options in (cli.load_verb(name).options for name in cli.verb_names()):
        for f in dataclasses.fields(options):
            text = typing.get_type_hints(options)[f.name] in (str, str | None, list[str], list[str] | None)
            if text and named.search(f.metadata["help"]) and f.name not in others:
                assert f.metadata["path"], (options, f.name)


def test_home_folder_in_recipes_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("data: wds:~/shards\nout: ~/runs/x\n")
    s = parsed("train", ["--recipe=~/r.yaml"])
    assert (s.data, s.out) == (f"wds:{tmp_path}/shards", f"{tmp_path}/runs/x")
    Bulk = cli.load_verb("predict bulk").options
    s = Bulk(source="hf-hub:a/b", images=["s3://b/~x", "~nobody-of-this-name/x", "a~"], out="s3://~/x")
    assert (s.source, s.images, s.out) == ("hf-hub:a/b", ["s3://b/~x", "~nobody-of-this-name/x", "a~"], "s3://~/x")
    assert outputs(s) == {}
    assert outputs(Bulk(source="r", images=["x"], out="o")) == {"out": ("o", "folder")}


def test_names_for_people_are_escaped(capsys, monkeypatch):
    put_in_place_of_verbs(monkeypatch, lambda: trained(out="i\x1b", skipped=["a\nb\x07: bad"]))
    _, out, _ = call(capsys, "train", "--data", "d", "--out", "o")
    assert "\nskipped 1 unreadable images:\n  a\\nb\\x07: bad\nbundle: i\\x1b (" in out
