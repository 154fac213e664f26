"""What bench answers: structure, ratios of medians, failures as rows. No duration is asserted, clocks are false."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image

import glsim
from glsim import cli
from glsim.checkpoints.bundle import preprocessing_of
from glsim.cli.bench import Options, show
from glsim.cli.parser import parse, split_commas
from glsim.data.images import open_image
from glsim.data.readers import read_data
from glsim.data.transforms import eval_transform
from glsim.evaluation import peak_memory, speed, workloads
from glsim.evaluation.speed import SpeedComparison, SpeedRow, compare_speed, in_turn, ratios
from glsim.evaluation.workloads import Job
from glsim.files import document
from glsim.models.boxes import select
from glsim.types import ConfigError

TINY = {"backbones": ["vit_tiny_patch16_224"], "sizes": [64], "batch_sizes": [2], "backbone_args": SMALL}
TINY |= {"methods": ["plain", "glsim:top_o=4"], "repeats": 2, "warmup": 1, "num_classes": 5, "device": "cpu"}
SETUP = Options(num_classes=5, backbone_args=SMALL, device="cpu")
TIMES = {"latency_ms", "latency_quartiles_ms", "images_per_second", "training_ms", "training_quartiles_ms"}


def as_row(job, **measured):
    return SpeedRow(**vars(job), **measured)


class Clock:
    """Time that passes only when a work says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, *durations):
        left = list(durations)

        def run():
            self.now += left.pop(0)

        return run


def test_rounds_are_taken_in_turn_and_warm_up_is_left_out():
    clock, order = Clock(), []
    works = {"a": clock.work(100, 50, 1, 2, 3), "b": clock.work(900, 70, 10, 20, 30)}
    spied = {name: lambda name=name: (order.append(name), works[name]()) for name in works}
    assert in_turn(spied, 2, 3, clock=clock) == {"a": [1, 2, 3], "b": [10, 20, 30]}
    assert "".join(order) == "ab" * 5


@pytest.mark.parametrize("when", [0, 2])
def test_a_work_that_fails_has_no_further_turns(when):
    clock, calls = Clock(), []

    def fails():
        calls.append(1)
        if len(calls) > when:
            raise RuntimeError("no room")

    found = in_turn({"bad": fails, "good": clock.work(5, 1, 2)}, 1, 2, clock=clock)
    assert found["good"] == [1, 2] and str(found["bad"]) == "no room" and len(calls) == when + 1


def test_errors_of_our_own_are_not_hidden():
    with pytest.raises(KeyError):
        in_turn({"bug": lambda: {}["x"]}, 0, 1)


def test_medians_spread_and_ratios(monkeypatch):
    """Rounds of 1, 2 and 12 s: the median is 2, whatever the mean."""
    durations = {"plain": [9, 1, 2, 12], "glsim:top_o=4": [9, 6, 5, 1]}
    clock = Clock()
    monkeypatch.setattr(speed, "answering", lambda model, job, device: clock.work(*durations[job.method]))
    original = speed.in_turn
    monkeypatch.setattr(speed, "in_turn", lambda *given: original(*given, clock=clock))
    settings = TINY | {"repeats": 3, "training": False, "memory": False, "against": "plain"}
    result = compare_speed(Options(**settings))
    plain, glsim = result.rows
    assert plain.latency_ms == 2000 and plain.latency_quartiles_ms == [1500, 7000]
    assert plain.images_per_second == 1 and glsim.latency_ms == 5000
    (ratio,) = result.ratio
    assert ratio.latency == 2.5 and set(document(ratio)) == {*speed.SETTINGS, "against", "latency"}
    assert (ratio.method, ratio.against, ratio.batch_size) == ("glsim:top_o=4", "plain", 2)
    text = show(result, Options())
    assert "2,000.0 ±2,750.0" in text and "2.500" in text and "divided by plain" in text


def test_ratios_pair_equal_settings_only():
    rows = []
    for batch, ms in ((1, 2.0), (8, 10.0)):
        for method, factor in (("plain", 1), ("glsim", 2 + batch / 10)):
            job = Job(method, "net", 64, batch, "float32", False)
            rows.append(as_row(job, latency_ms=ms * factor, memory_mib=100 * factor))
    rows.append(as_row(Job("glsim", "other", 64, 1, "float32", False), latency_ms=1.0))  # no plain beside
    rows.append(as_row(Job("cal", "net", 64, 1, "float32", False), error="no", memory_mib=3.0))
    found = ratios(rows, "plain")
    assert [(r.method, r.batch_size) for r in found] == [("glsim", 1), ("glsim", 8)]
    assert [r.latency for r in found] == pytest.approx([2.1, 2.8])
    assert [r.memory for r in found] == pytest.approx([2.1, 2.8])


def test_one_json_document_with_everything(capsys, tmp_path, monkeypatch):
    """Through the command line: times, memory in another process, loading, plots."""
    real, known = speed.peaks_elsewhere, []

    def peaks(job, *rest):  # the start of a process takes seconds: one measures for both rows
        known.append(known[0] if known else real(job, *rest))
        return known[-1]

    monkeypatch.setattr(speed, "peaks_elsewhere", peaks)
    for i in range(3):
        Image.new("RGB", (80, 70), (i, 0, 0)).save(tmp_path / f"{i}.jpg")
    words = [
        "--methods",
        "plain",
        "glsim:top_o=4",
        "--backbones",
        "vit_tiny_patch16_224",
        "--sizes=64",
        "--batch-sizes",
    ]
    words += ["2", "--repeats", "2", "--warmup", "1", "--num-classes", "5", "--device", "cpu", "--against", "plain"]
    words += [f"--backbone-args={json.dumps(SMALL)}", "--data", str(tmp_path), "--workers", "0", "--json"]
    assert cli.main(["bench", *words, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    result = json.loads(text)
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == result
    assert [row["method"] for row in result["rows"]] == ["plain", "glsim:top_o=4"]
    for row in result["rows"]:
        more = {"parameters", "memory_mib", "training_memory_mib", "loaded_images_per_second"}
        assert set(row) == {*speed.SETTINGS, *TIMES, *more}
        low, high = row["latency_quartiles_ms"]
        assert 0 < low <= row["latency_ms"] <= high
        assert row["images_per_second"] == pytest.approx(2000 / row["latency_ms"])
        assert 0 < row["memory_mib"] <= row["training_memory_mib"]
    (ratio,) = result["ratio"]
    plain, glsim = result["rows"]
    for part, key in speed.RATIOS.items():
        assert ratio[part] == glsim[key] / plain[key]
    assert result["environment"]["device"].startswith("cpu")
    for name in ("cost.png", "throughput.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.format == "PNG"


def test_what_does_not_fit_is_a_row_that_says_why(capsys):
    settings = TINY | {
        "methods": ["plain", "transfg"],
        "backbones": ["resnet18", "vit_tiny_patch16_2"],
        "against": "plain",
    }
    settings |= {"backbone_args": {}, "memory": False, "training": False, "repeats": 1}
    result = compare_speed(Options(**settings))
    errors = [row.error for row in result.rows]
    assert errors[0] is None and "only the patches of ViT and DeiT can overlap, not those of 'resnet18'" in errors[1]
    assert "timm has no model 'vit_tiny_patch16_2'" in errors[2] and "vit_tiny_patch16_224" in errors[3]
    assert result.ratio == [] and result.exit_code is None
    assert "failed: stride=0.75: only the patches" in show(result, Options())
    words = ["bench", "--methods", "transfg", "--backbones", "resnet18", "--no-memory"]
    assert cli.main([*words, "--json"]) == 1  # nothing was measured
    assert json.loads(capsys.readouterr().out)["exit_code"] == 1
    assert cli.main(words) == 1 and " 1 failed: stride=0.75: only" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match="could not|no option"):
        workloads.build(Job("glsim:crop=3", "vit_tiny_patch16_224", 64, 1, "float32", False), Options())


def test_a_row_that_fails_while_running_does_not_stop_the_others(monkeypatch):
    original = speed.training

    def training(model, job, device):
        if job.method != "plain":
            return lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
        return original(model, job, device)

    monkeypatch.setattr(speed, "training", training)
    plain, glsim = compare_speed(Options(**TINY | {"memory": False})).rows
    assert set(document(plain)) >= TIMES
    assert glsim.error == "CUDA out of memory." and glsim.latency_ms is None


def test_what_answers_early_is_not_compiled():
    """`answers` would not see through the compiled model that it may regroup the second passes."""
    settings = TINY | {"methods": ["glsim:top_o=4,early_loss=1.0,margin=0.5"], "compile": "yes", "memory": False}
    (row,) = compare_speed(Options(**settings)).rows
    assert "answers early (margin 0.5), which is not compiled: --compile no" in row.error


def test_images_that_are_not_square_are_shown():
    jobs = [Job(name, "net", size, 1, "float32", False) for name, size in (("a", [32, 64]), ("b", 64))]
    rows = [as_row(job, latency_ms=1.0, latency_quartiles_ms=[1, 1]) for job in jobs]
    text = show(SpeedComparison(rows, None, {"device": "cpu"}), Options())
    assert "[32, 64]" in text


def test_options_follow_the_method():
    def options(method):
        return workloads.build(Job(method, "vit_tiny_patch16_224", 64, 1, "float32", False), SETUP).config.options

    found = options("glsim:top_o=3,crop_size=[32,48],metric=rollout:first=1")
    assert (found["top_o"], found["crop_size"], found["metric"]) == (3, [32, 48], "rollout:first=1")
    assert options("glsim:dropout=0.1,crop_size=null")["crop_size"] is None


def test_dtype_compile_and_lists_span_the_rows(monkeypatch):
    """Every combination is asked for once; nothing runs."""
    asked = []
    monkeypatch.setattr(speed, "measure", lambda jobs, *rest: asked.append(jobs) or [as_row(j) for j in jobs])
    lists = {"sizes": [64, 96], "batch_sizes": [1, 2], "dtypes": ["float32", "bfloat16"], "compile": "both"}
    result = compare_speed(Options(**TINY | lists))
    assert len(asked) == 16 and all([job.method for job in jobs] == TINY["methods"] for jobs in asked)
    assert len(set(result.rows)) == 32


def test_bfloat16_is_computed_in(monkeypatch):
    seen = []
    job = Job("glsim:top_o=4", "vit_tiny_patch16_224", 64, 2, "bfloat16", False)
    model = workloads.build(job, SETUP)
    model.register_forward_hook(lambda module, given, output: seen.append((given[0].dtype, output.logits.dtype)))
    workloads.training(model, job, torch.device("cpu"))()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    workloads.answering(model, job, torch.device("cpu"))()
    assert seen == [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


def test_a_training_step_changes_the_weights():
    job = Job("plain", "vit_tiny_patch16_224", 64, 2, "float32", False)
    model = workloads.build(job, SETUP)
    before = model.head.weight.clone()
    workloads.training(model, job, torch.device("cpu"))()
    assert not torch.equal(model.head.weight, before) and model.head.weight.grad is None


@pytest.mark.skipif(not peak_memory.STATUS.exists(), reason="needs /proc")
@pytest.mark.slow
def test_a_row_does_not_inherit_what_the_process_before_it_held():
    """A child of a process of 400 MiB and more; `ru_maxrss` would tell that number."""
    held = b"x" * (400 * 2**20)
    code = "from glsim.evaluation.peak_memory import resident; print(resident(peak=True))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = peak_memory.resident(peak=False)
    assert len(held) == 400 * 2**20 and int(child.stdout) < here - 200 * 2**20


@pytest.mark.skipif(not peak_memory.STATUS.exists(), reason="needs /proc")
def test_a_peak_is_seen_after_it_has_passed_and_can_be_forgotten():
    cpu = torch.device("cpu")
    peak_memory.forget_peak(cpu)
    before = peak_memory.peak(cpu)
    torch.ones(100 * 2**20, dtype=torch.uint8)
    assert peak_memory.peak(cpu) > before + 90 * 2**20
    peak_memory.forget_peak(cpu)
    assert peak_memory.peak(cpu) < before + 50 * 2**20


def test_a_child_that_dies_says_why():
    with pytest.raises(RuntimeError, match="while measuring memory: .*top_o=99, but the grid"):
        peak_memory.peaks_elsewhere(Job("glsim:top_o=99", "vit_tiny_patch16_224", 64, 1, "float32", False), SETUP)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": ["plain", "x"]}, "unknown method 'x'"),
        ({"against": "cal"}, "unknown method to compare against 'cal'; choose from: glsim, plain"),
        ({"dtypes": ["int8"]}, "unknown dtype 'int8'"),
        ({"compile": "maybe"}, "unknown compile 'maybe'"),
        ({"sizes": []}, "one or more"),
        ({"sizes": [224, 224]}, "each only once"),
        ({"batch_sizes": [0]}, "at least 1"),
        ({"repeats": 0}, "repeats=0: at least 1"),
        ({"sources": ["run", "run"]}, "each only once"),
        ({"sources": ["run"], "sizes": [64]}, r"sizes=\[64\]: not with --sources"),
        ({"sources": ["run"], "methods": ["plain"]}, "methods=.*not with --sources"),
        ({"sources": ["run"], "against": "plain"}, "unknown method to compare against 'plain'; choose from: run"),
        ({"sources": ["run"], "images": 4}, "images=4: at least the largest of batch_sizes, 8"),
    ],
)
def test_wrong_settings(given, said):
    with pytest.raises(ConfigError, match=said):
        Options(**given)


def test_lists_of_numbers_take_commas_too():
    for words in (["--sizes", "64,96"], ["--sizes=64,96"], ["--sizes", "64", "96"], ["--sizes", "64,", "96"]):
        assert parse("bench", Options, [*words, "--dtypes", "float32", "bfloat16"]).sizes == [64, 96]
    assert split_commas(["--labels", "", "a,b"], {"--sizes"}) == ["--labels", "", "a,b"]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("selection_benchmark", ROOT / "benchmarks" / "selection.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_selection_script_agrees_with_itself(script, capsys, monkeypatch):
    medians = script.main(["--image-size", "64", "--repeats", "1"])
    assert {"gls_cos", "rollout, rows", "rollout, matrices", "psm, rows", "psm, matrices"} < set(medians)
    assert "16 patches, psm 25" in capsys.readouterr().out
    monkeypatch.setitem(script.METRICS, "psm", lambda f: script.psm_matrix(f) * 1.001)
    with pytest.raises(AssertionError, match="psm"):
        script.main(["--image-size", "64", "--repeats", "1"])


@pytest.fixture
def two_pass():
    spec = importlib.util.spec_from_file_location("two_pass_benchmark", ROOT / "benchmarks" / "two_pass.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_two_pass_script_takes_the_forward_apart(two_pass, capsys, monkeypatch):
    words = ["--backbones", "test_vit", "--sizes", "64", "--batch-sizes", "2", "--repeats", "2", "--device", "cpu"]
    (row,) = two_pass.main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == [row]
    assert list(row["parts_ms"]) == ["first pass", "score", "box", "crop", "second pass", "aggregator, head"]
    assert row["glsim_ratio"] == row["glsim_ms"] / row["timm_ms"]
    assert 0 < row["added_percent"] * row["timm_ms"] / 100 < sum(row["parts_ms"].values())
    text = two_pass.as_text([row])
    assert f"| test_vit | 64 | 2 | {row['timm_ms']:,.1f} |" in text and "| second pass |" in text
    monkeypatch.setattr(two_pass, "select", lambda *given: two_pass.__dict__["real"](*given[:4], "inclusive"))
    monkeypatch.setattr(two_pass, "real", select, raising=False)
    with pytest.raises(AssertionError):  # steps that do not do what the model does are not timed
        two_pass.main(words)


# --- trained bundles --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second(run_folder, tmp_path_factory):
    """Another bundle: the same weights, crops of half the size, no measured accuracy."""
    folder = tmp_path_factory.mktemp("second") / "small"
    glsim.save(glsim.load(run_folder, crop_size=32), folder)
    return folder


def test_bundles_are_rows_with_their_accuracy_and_answer_test_images(run_folder, second, birds, tmp_path, monkeypatch):
    seen = []
    original = speed.build

    def build(job, s):
        model = original(job, s)
        model.register_forward_hook(lambda module, given, output: seen.append((job.method, given[0].clone())))
        return model

    monkeypatch.setattr(speed, "build", build)
    names = [str(run_folder), str(second)]
    given = {"sources": names, "against": names[0], "data": str(birds), "images": 4, "batch_sizes": [2], "workers": 0}
    given |= {"training": False, "memory": False, "repeats": 2, "warmup": 0, "device": "cpu", "out": str(tmp_path)}
    result = compare_speed(Options(**given))
    first, other = result.rows
    measured = json.loads((run_folder / "metrics.json").read_text())["test"]["top1"]
    assert first.accuracy == measured and other.accuracy is None
    assert [(r.method, r.backbone, r.image_size) for r in (first, other)] == [
        (name, "vit_tiny_patch16_224", 64) for name in names
    ]
    assert result.ratio[0].latency == other.latency_ms / first.latency_ms
    assert first.images_per_second == pytest.approx(2000 / first.latency_ms)
    assert [name for name, _ in seen] == [names[0], names[0], names[1], names[1]] * 2  # two batches every turn
    paths = read_data(birds)["test"].paths
    transform = eval_transform(preprocessing_of(glsim.load(run_folder)))
    expected = torch.stack([transform(open_image(paths[i * len(paths) // 4])) for i in range(4)])
    torch.testing.assert_close(torch.cat([seen[0][1], seen[1][1]]), expected, atol=1e-6, rtol=1e-6)
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.format == "PNG"
    text = show(result, Options())
    assert f"{measured:.1%}" in text and "top-1" in text


def test_the_time_of_a_batch_is_that_of_a_turn_divided_by_its_batches(run_folder, birds, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "answering", lambda *given: clock.work(6, 3))
    original = speed.in_turn
    monkeypatch.setattr(speed, "in_turn", lambda *given: original(*given, clock=clock))
    given = {"sources": [str(run_folder)], "data": str(birds), "images": 7, "batch_sizes": [2], "workers": 0}
    given |= {"training": False, "memory": False, "repeats": 1, "warmup": 1, "device": "cpu"}
    (row,) = compare_speed(Options(**given)).rows
    assert row.latency_ms == 1000 and row.images_per_second == 2  # 3 whole batches of 7 images in 3 s


def test_bundles_that_cannot_be_measured(run_folder, birds, tmp_path, capsys):
    fast = {"training": False, "memory": False, "repeats": 1, "warmup": 0, "device": "cpu", "workers": 0}
    rows = compare_speed(Options(sources=[str(tmp_path / "gone"), str(run_folder)], batch_sizes=[1], **fast)).rows
    assert "gone does not exist; give a bundle folder" in rows[0].error and rows[1].error is None
    (row,) = compare_speed(Options(sources=[str(run_folder)], data=str(birds), images=99, batch_sizes=[1], **fast)).rows
    assert "has 9 test images, 99 were asked for" in row.error
    assert cli.main(["bench", "--sources", str(run_folder), "--data", str(tmp_path / "gone")]) == 3
    damaged = tmp_path / "damaged"
    glsim.save(glsim.load(run_folder), damaged)
    (damaged / "metrics.json").write_text("{")
    (row,) = compare_speed(Options(sources=[str(damaged)], batch_sizes=[1], **fast)).rows
    assert "metrics.json is damaged or cannot be read" in row.error


def test_memory_of_a_bundle_is_measured_in_a_process_of_its_own(run_folder):
    found = peak_memory.peaks_elsewhere(
        Job(str(run_folder), "", 0, 1, "float32", False), Options(sources=[str(run_folder)], device="cpu")
    )
    assert 0 < found["memory_mib"] <= found["training_memory_mib"]
