"""Bulk jobs. Ray itself is started in the slow tests only; in the others its place is taken by a loop over the parts."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import scene, small_model
from filelock import FileLock

import glsim
from glsim import cli
from glsim.checkpoints.bundle import amend, load
from glsim.cli import predict_bulk as verb
from glsim.files import MARKER
from glsim.inference import bulk_files, ray_bulk
from glsim.inference.bulk_files import find_paths
from glsim.types import ConfigError, DataError, DataWarning

pytest.importorskip("pyarrow", reason="the extra `scale` is not installed", exc_type=ImportError)
import pyarrow as pa
from pyarrow import parquet
from pyarrow.fs import FileSelector


@pytest.fixture
def photos(tmp_path):
    """Seven images in a folder tree with awkward names; the fourth of them, in order, is no image."""
    folder = tmp_path / "photos of mine"
    for i, name in enumerate(["a.png", "b.png", "sub/c%20.png", "sub/d.jpg", "sub/é f.png", "x.png", "y.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name == "sub/d.jpg":
            (folder / name).write_bytes(b"no image")
        else:
            scene((60 + 4 * i, 50), seed=i).save(folder / name)
    return folder


@pytest.fixture
def here(monkeypatch):
    """Parts are answered in this process, by the worker that Ray would run; yields the numbers of those answered."""
    asked = []

    def loop(ray, model, out, todo, workers, device, options):
        worker = ray_bulk.Worker(model, out, device="cpu", **options)
        for item in todo:
            asked.append(item["part"])
            batch = worker({name: [value] for name, value in item.items()})
            yield {k: np.array(v) for k, v in batch.items()}

    class NoRay:
        class exceptions:
            RayError = RuntimeError

    monkeypatch.setattr(ray_bulk, "need_ray", NoRay)
    monkeypatch.setattr(ray_bulk, "cluster", lambda *_: nullcontext())
    monkeypatch.setattr(ray_bulk, "answer_parts", loop)
    return asked


def rows(out):
    return [row for file in sorted(Path(out).glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]


def same(row, answer):
    assert row["path"] == answer.path and row["error"] is None
    assert tuple(row["labels"]) == answer.labels and tuple(row["box"]) == answer.box
    assert row["second_pass"] == answer.second_pass
    assert row["probabilities"] == pytest.approx(answer.probabilities, abs=1e-5)
    assert row["confidence"] == pytest.approx(answer.probabilities[0], abs=1e-5)


def job(run_folder, images, out, **more):
    settings = {"part_size": 3, "workers": 2, "batch_size": 2} | more
    return ray_bulk.predict_bulk(run_folder, [str(i) for i in images], out, **settings)


def test_rows_are_the_answers_of_the_local_engine(run_folder, photos, tmp_path, here):
    result = job(run_folder, [photos], tmp_path / "out", embedding="fused", top_k=2)
    assert (result.images, result.parts, result.answered, result.errors) == (7, 3, 6, 1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".glsim",
        "job.json",
        "part-000000.parquet",
        "part-000001.parquet",
        "part-000002.parquet",
    ]
    found = rows(tmp_path / "out")
    paths = [row["path"] for row in found]
    answers = list(glsim.Predictor(run_folder, top_k=2, embedding="fused").stream(paths))
    assert paths == sorted(str(p) for p in photos.rglob("*.*")) and len(paths) == 7
    for row, answer in zip(found, answers, strict=True):
        if row["path"].endswith("d.jpg"):
            assert "not an image" in row["error"] == answer.reason
            assert row["labels"] is row["probabilities"] is row["confidence"] is row["box"] is row["embedding"] is None
        else:
            same(row, answer)
            assert row["embedding"] == pytest.approx(answer.embedding, abs=1e-4)
    assert "embedding" not in bulk_files.schema(False).names


def test_a_stopped_job_goes_on_with_what_is_missing(run_folder, photos, tmp_path, here):
    out = tmp_path / "out"
    job(run_folder, [photos], out)
    expected = rows(out)
    kept = (out / "part-000001.parquet").stat().st_mtime_ns
    (out / "part-000000.parquet").unlink()
    (out / "part-000002.parquet").unlink()
    (out / ".part-000002.parquet.0123").write_bytes(b"half a fil")  # a worker was killed while it wrote
    here.clear()
    result = job(run_folder, [photos], out)
    assert here == [0, 2] and (result.parts_before, result.answered, result.errors) == (1, 6, 1)
    assert rows(out) == expected and (out / "part-000001.parquet").stat().st_mtime_ns == kept
    assert len(list(out.iterdir())) == 5
    here.clear()
    result = job(run_folder, [photos], out)
    assert (result.answered, result.errors, result.images_per_second) == (6, 1, 0) and not here
    worker = ray_bulk.Worker(load(run_folder), bulk_files.folder_uri(str(out)), None)
    assert worker.answer(1, ["never looked at"] * 3) == (3, 1)  # Ray asks again for a part that was just finished


def test_a_row_is_a_box_of_an_image(run_folder, photos, tmp_path, here):
    lines = ["a.png,5,5,30,40,0.9,animal", "y.png,1,2,50,50,,", "sub/d.jpg,1,2,5,5,0.5,", "a.png,70,5,90,40,0.8,animal"]
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("\n".join(["path,left,top,right,bottom,conf,category", *lines]))
    with pytest.warns(DataWarning, match="no box of 4 of 7 images"):
        result = job(run_folder, [photos], tmp_path / "out", boxes=boxes)
    first, outside, bad, last = rows(tmp_path / "out")
    assert (result.images, result.answered, result.errors) == (4, 2, 2)
    assert first["path"] == f"{photos / 'a.png'}#xywh=5,5,25,35&margin=0.1" and first["detection"] == [5, 5, 30, 40]
    assert (first["detection_category"], first["detection_confidence"]) == ("animal", 0.9)
    assert (last["detection_confidence"], last["error"], bad["labels"]) == (None, None, None)
    assert outside["error"] == "the box lies outside of 60 x 50 pixels" and outside["detection_confidence"] == 0.8
    (same_box,) = glsim.Predictor(run_folder)(first["path"])
    assert same_box.labels == tuple(first["labels"]) and list(same_box.box) == first["box"]


def test_answered_and_errors_are_all_images_in_text_too(run_folder, photos, tmp_path, here):
    out = tmp_path / "out"
    text = verb.show(job(run_folder, [photos], out), None)
    assert "7 images in 3 parts; 6 answered, 1 could not be read; " in text
    (out / "part-000001.parquet").unlink()  # the one with the bad image
    text = verb.show(job(run_folder, [photos], out), None)
    assert "6 answered, 1 could not be read; " in text and text.endswith("2 of 3 parts were there")


def folder(file):
    file.mkdir()
    (file / "kept").write_text("not ours")


def linked(file):
    file.symlink_to("nowhere")


def swapped(file):
    shutil.copy(file.with_name("part-000002.parquet"), file)


def short(file):
    shutil.copy(file.with_name("part-000002.parquet"), file)
    table = parquet.read_table(file)
    told = {bulk_files.OWNER: table.schema.metadata[bulk_files.OWNER].replace(b'"part": 2', b'"part": 1')}
    parquet.write_table(table.replace_schema_metadata(told), file)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.write_bytes(b"garbage"), r"damaged \("),
        (lambda file: file.write_bytes(b""), r"damaged \("),
        (lambda file: file.write_bytes(b"PAR1" + bytes(100) + b"PAR1"), r"damaged \("),
        (lambda file: file.write_bytes(file.with_name("part-000000.parquet").read_bytes()[:-50]), r"damaged \("),
        (os.mkfifo, r"damaged \(.*not a regular file"),
        (folder, r"damaged \(.*a folder, not a file.*; it is now \.aside-part-000001\.parquet-\w{8}$"),
        (lambda file: parquet.write_table(pa.table({"x": [1, 2, 3]}), file), "not of this job"),
        (swapped, "not of this job"),
        (short, "1 rows for 3 images"),
        (linked, None),  # to nothing: as if it were not there
    ],
)
def test_a_part_is_not_trusted_by_its_name(run_folder, photos, tmp_path, here, capsys, spoil, said):
    out = tmp_path / "out"
    job(run_folder, [photos], out)
    expected, file = rows(out), out / "part-000001.parquet"
    file.unlink()
    spoil(file)
    here.clear()
    result = job(run_folder, [photos], out)
    assert here == [1] and rows(out) == expected and (result.parts_before, result.answered) == (2, 6)
    assert list(result.parts_again) == [file.name] * bool(said)
    if said:
        assert re.search(said, result.parts_again[file.name]), result.parts_again
        verb.show(result, None)
        assert capsys.readouterr().err.startswith("part-000001.parquet was made again: ")
    assert [f.read_text() for f in out.glob(".aside*/kept")] == ["not ours"] * (spoil is folder)


def test_parts_of_another_job_are_made_again(run_folder, photos, tmp_path, here):
    for name, top_k in (("a", 2), ("b", 3)):
        job(run_folder, [photos], tmp_path / name, top_k=top_k)
    shutil.copy(tmp_path / "a" / "part-000000.parquet", tmp_path / "b")
    here.clear()
    assert job(run_folder, [photos], tmp_path / "b", top_k=3).parts_again == {"part-000000.parquet": "not of this job"}
    assert here == [0] and {len(row["labels"]) for row in rows(tmp_path / "b") if not row["error"]} == {3}


@pytest.mark.parametrize("name", [".part-x", ".part-000000.parquet.0123", ".job.json.9.tmp", "part-x.parquet", ".x"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, linked])
def test_nothing_that_lies_about_is_in_the_way(run_folder, photos, tmp_path, here, name, make):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / name)
    assert job(run_folder, [photos / "sub"], tmp_path / "out").answered == 2
    assert (tmp_path / "out" / name).is_symlink() or (tmp_path / "out" / name).exists()


@pytest.mark.parametrize(
    ("write", "error", "said"),
    [
        (lambda file: file.write_text("[]"), DataError, r"job\.json, which says .* is damaged \(wanted an object"),
        (lambda file: file.write_text("null"), DataError, "wanted an object"),
        (lambda file: file.write_text(""), DataError, "is damaged"),
        (lambda file: file.write_text("{"), DataError, "is damaged"),
        (lambda file: file.write_text("[" * 100_000), DataError, "more than 64 levels"),
        (lambda file: file.write_text('{"format": NaN}'), DataError, "NaN is no JSON"),
        (lambda file: file.write_bytes(b"\xff\x00\x9b"), DataError, "is damaged"),
        (Path.mkdir, DataError, "a folder, not a file"),
        (os.mkfifo, DataError, "not a regular file"),
        (lambda file: file.write_text("{}"), ConfigError, r"another job: format \(was None, is 2\);"),
        (
            lambda file: file.write_text('{"format": 1, "model": "x"}'),
            ConfigError,
            r"another job: format \(was 1, is 2\);",
        ),
        (lambda file: file.write_text('{"format": 2}'), ConfigError, r"another job: model \(was None"),
        (
            lambda file: file.write_text(json.dumps({"format": 2, "model": "\x1b[2J" + "x" * 10_000})),
            ConfigError,
            r"model \(was \\x1b\[2Jx+ \.\. \(9,924 more characters\), is",
        ),
    ],
)
def test_a_damaged_job_file_is_one_sentence(run_folder, photos, tmp_path, here, write, error, said):
    out = tmp_path / "out"
    out.mkdir()
    write(out / "job.json")
    with pytest.raises(error, match=said) as caught:
        job(run_folder, [photos], out)
    assert not here and len(str(caught.value)) < 1500


def test_an_image_without_an_answer_spoils_no_other(run_folder, photos, tmp_path, here, monkeypatch):
    real = glsim.Predictor.stream

    def refuses(self, paths):
        if any(str(path).endswith("x.png") for path in paths):
            raise DataError("an answer that is not finite\nand more")
        return real(self, paths)

    monkeypatch.setattr(glsim.Predictor, "stream", refuses)
    assert job(run_folder, [photos], tmp_path / "out", part_size=7).errors == 2
    errors = {Path(row["path"]).name: row["error"] for row in rows(tmp_path / "out") if row["error"]}
    assert set(errors) == {"d.jpg", "x.png"} and errors["x.png"] == "an answer that is not finite"


def test_a_folder_holds_one_job(run_folder, photos, tmp_path, here):
    out = tmp_path / "out"
    job(run_folder, [photos], out)
    with pytest.raises(ConfigError, match=r"another job: top_k \(was 5, is 2\)"):
        job(run_folder, [photos], out, top_k=2)
    with pytest.raises(ConfigError, match=r"another job: images \(was 7, is 3\), list"):
        job(run_folder, [photos / "sub"], out)
    warmer = shutil.copytree(run_folder, tmp_path / "warmer")
    amend(warmer, {}, calibration={"temperature": 2.0, "count": 9, "data": "birds"})  # the same weights
    with pytest.raises(ConfigError, match=r"another job: config \(was "):
        job(warmer, [photos], out)
    (out / "job.json").unlink()
    with pytest.raises(ConfigError, match="holds parts, but no job.json"):
        job(run_folder, [photos], out)
    with pytest.raises(DataError, match="file: "):
        (tmp_path / "file").write_text("")
        job(run_folder, [photos], tmp_path / "file")


def test_a_job_has_its_folder_alone(run_folder, photos, tmp_path, here):
    """What a running job is writing is not taken for what a killed one left."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".part-000000.parquet.0123").write_bytes(b"half a fil")
    with FileLock(out / ".lock"), pytest.raises(ConfigError, match="out is in use by another job; wait for it"):
        job(run_folder, [photos], out)
    assert (out / ".part-000000.parquet.0123").exists() and not here
    job(run_folder, [photos], out)
    assert not (out / ".part-000000.parquet.0123").exists() and not (out / ".lock").exists()


def test_in_a_store_only_old_leftovers_are_removed(monkeypatch):
    """A store that is in memory; it has no locks either."""
    system, _ = bulk_files.locate("mock:///")
    bulk_files.claim_folder("mock:///out", {"format": 1})
    for name in (".part-000000.parquet.0123", "part-000001.parquet"):
        with system.open_output_stream(f"out/{name}") as stream:
            stream.write(b"half a fil")

    def names():
        return sorted(info.base_name for info in system.get_file_info(FileSelector("out")))

    with bulk_files.lock_folder("mock:///out", {"format": 1}), bulk_files.lock_folder("mock:///out", {"format": 1}):
        assert names() == [".part-000000.parquet.0123", "job.json", "part-000001.parquet"]
    now = time.time()
    monkeypatch.setattr(bulk_files.time, "time", lambda: now + bulk_files.STALE + 60)
    bulk_files.claim_folder("mock:///out", {"format": 1})
    assert names() == ["job.json", "part-000001.parquet"]


def test_a_wish_the_model_cannot_grant_ends_it_before_any_worker_starts(photos, tmp_path, here):
    plain = glsim.save(small_model("plain"), tmp_path / "plain")
    with pytest.raises(ConfigError, match="unknown embedding of this model 'crop'; choose from: global"):
        job(plain, [photos], tmp_path / "out", embedding="crop")
    assert not here and not (tmp_path / "out").exists()


def test_a_part_is_written_whole_or_not_at_all(run_folder, photos, tmp_path, here, monkeypatch):
    out = tmp_path / "out"

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", broken)
    with pytest.raises(OSError, match="No space left"):
        job(run_folder, [photos], out)
    assert sorted(p.name for p in out.iterdir()) == [".glsim", "job.json"]
    monkeypatch.undo()


def test_lists_and_stores_name_the_same_images(photos, tmp_path):
    expected = sorted(str(p) for p in photos.rglob("*.*"))
    assert find_paths([str(photos)]) == expected
    uris = find_paths([f"file://{photos}/"])
    assert sorted(uri.removeprefix("file://") for uri in uris) == expected
    assert find_paths([f"file://{photos}/sub/é f.png"]) == [f"file://{photos}/sub/é f.png"]
    relative = [os.path.relpath(p, tmp_path) for p in expected]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "path"], *enumerate(relative)])
    parquet.write_table(pa.table({"path": [*relative, uris[0]]}), tmp_path / "list.parquet")
    assert find_paths([str(tmp_path / "list.csv")]) == expected
    assert find_paths([str(tmp_path / "list.parquet")]) == [*expected, uris[0]]
    assert find_paths([f"file://{tmp_path}/list.csv"]) == [f"file://{tmp_path}/{p}" for p in relative]
    assert find_paths([str(tmp_path / "list.csv"), str(photos)]) == expected  # each once
    for delimiter in ";\t":
        lines = [f"Path{delimiter}label", *(f"{path}{delimiter}x" for path in relative)]
        (tmp_path / "other.csv").write_text("\n".join(lines), encoding="utf-8-sig")
        assert find_paths([str(tmp_path / "other.csv")]) == expected
    (photos / "@eaDir").mkdir()
    shutil.copy(photos / "a.png", photos / "@eaDir")
    assert find_paths([f"file://{photos}/"]) == uris and find_paths([str(photos)]) == expected


def test_images_come_out_of_stores_by_their_uri(run_folder, photos):
    names = ["a.png", "sub/c%20.png", "sub/é f.png", "none.png", "sub/d.jpg"]
    stored = list(glsim.Predictor(run_folder).stream([f"file://{photos}/{name}" for name in names]))
    plain = list(glsim.Predictor(run_folder).stream([photos / name for name in names]))
    assert [a._replace(path="") for a in stored[:3]] == [a._replace(path="") for a in plain[:3]]
    assert "cannot be read" in stored[3].reason and "No such file or directory" in stored[3].reason
    assert stored[4].reason == plain[4].reason


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.csv", "file\na.png\n", "the first line must name the columns path"),
        ("x.csv", "", "the first line must name the columns path"),
        ("x.csv", "path,id\na.png,1\n,2\n", "line 3: empty path"),
        ("x.csv", "path\n", "no image found"),
        ("x.tsv", "path\n\0", "it holds zero bytes, as UTF-16 and files of no text do"),
        ("x.parquet", "no parquet", "a list needs a column path"),
    ],
)
def test_lists_that_are_none(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        find_paths([str(tmp_path / name)])


def test_places_that_are_not_there(tmp_path):
    for given in (str(tmp_path / "none.csv"), f"file://{tmp_path}/none", str(tmp_path / "none")):
        with pytest.raises(DataError, match="none"):
            find_paths([given])
    with pytest.raises(ConfigError, match="nonsense://.*s3://"):
        find_paths(["nonsense://x/y"])


@pytest.mark.parametrize(("gpus", "workers"), [(1, 1), (1, 3), (8, 8), (8, 20), (4, 2), (2, 7), (3, 12)])
def test_every_worker_finds_room_on_a_gpu(gpus, workers):
    share = ray_bulk.gpu_share(gpus, workers)
    assert 0 < share <= 1 and int(1 / share) * gpus >= workers
    assert ray_bulk.gpu_share(0, workers) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bulk", "run", "x.jpg"], "out"),
        (["bulk", "run", "x.jpg", "--out", "o", "--format", "csv"], "unrecognized arguments: --format"),
        (["bulk", "run", "x.jpg", "--out", "o", "--workers", "0"], "workers=0: at least 1"),
        (["bulk", "run", "x.jpg", "--out", "o", "--part-size", "0"], "part_size=0: at least 1"),
        (["bulk", "run", "x.jpg", "--out", "o", "--skip-bad"], "unrecognized arguments: --skip-bad"),
        (["run", "x.jpg", "--engine", "spark"], "engine"),
        (["run", "x.jpg", "--engine", "ray"], "note: predict --engine ray is now: glsim predict bulk"),
        (["run", "x.jpg", "--address", "auto"], "unrecognized arguments: --address"),
        (["run", "x.jpg", "--part-size", "10"], "unrecognized arguments: --part-size"),
        (["run", "x.jpg", "--embedding", "fused", "--out", "x.csv"], "take jsonl"),
    ],
)
def test_wrong_options(capsys, words, said):
    assert cli.main(["predict", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_old_spelling_is_the_same_job(run_folder, photos, tmp_path, here, capsys):
    words = [str(run_folder), str(photos), "--workers", "2", "--part-size", "3", "--json"]
    documents = []
    for name, more in (("old", ["predict", "--engine", "ray"]), ("new", ["predict", "bulk"])):
        assert cli.main([*more, *words, "--out", str(tmp_path / name)]) == 0
        printed = capsys.readouterr()
        assert ("note: predict --engine ray is now: glsim predict bulk" in printed.err) == (name == "old")
        documents.append(json.loads(printed.out))
    assert list(documents[0]) == list(documents[1]) and rows(tmp_path / "old") == rows(tmp_path / "new")
    assert (documents[0]["engine"], documents[0]["images"], documents[0]["parts"]) == ("ray", 7, 3)


def test_without_ray_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    assert cli.main(["predict", "bulk", "run", "x.jpg", "--out", str(tmp_path / "o")]) == 2
    assert "pip install 'glsim[scale]'" in capsys.readouterr().err
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_embeddings_stand_in_json_lines(run_folder, photos, capsys):
    words = ["--embedding", "global", "--format", "jsonl", "--workers", "0"]
    assert cli.main(["predict", str(run_folder), str(photos / "a.png"), *words]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (answer,) = glsim.Predictor(run_folder, embedding="global")(photos / "a.png")
    assert json.loads(line)["embedding"] == pytest.approx(answer.embedding, abs=1e-6)
    with pytest.raises(ConfigError, match="unknown embedding of this model 'x'; choose from: crop, fused, global"):
        glsim.Predictor(run_folder, embedding="x")(photos / "a.png")


# --- with Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    """160 large images, slow enough to be in the middle of; two of them are none."""
    (tmp_path / "many").mkdir()
    for i in range(4):
        scene((1600, 1200), seed=i).save(tmp_path / f"{i}.jpg", quality=95)
    for i in range(160):
        if i in (7, 100):
            (tmp_path / "many" / f"{i:03d}.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[: 100 * (i == 100)])
        else:
            shutil.copy(tmp_path / f"{i % 4}.jpg", tmp_path / "many" / f"{i:03d}.jpg")
    return tmp_path / "many"


def start(run_folder, many, out):
    words = [
        "predict",
        "bulk",
        run_folder,
        many,
        "--workers",
        "2",
        "--part-size",
        "5",
        "--out",
        out,
        "--json",
    ]
    pytest.importorskip("ray", reason="the extra `scale` is not installed", exc_type=ImportError)
    code = [sys.executable, "-m", "glsim.cli", *map(str, words)]
    return subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_parts(process, out, count):
    end = time.monotonic() + 240
    while len(list(out.glob("*.parquet"))) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def workers_of(process):
    below = psutil.Process(process.pid).children(recursive=True)
    return [p for p in below if "MapWorker" in " ".join(p.cmdline())]


def check_against_the_local_engine(run_folder, many, out):
    found = rows(out)
    answers = list(glsim.Predictor(run_folder).stream(sorted(many.iterdir())))
    assert len(found) == len(answers) == 160
    for i, (row, answer) in enumerate(zip(found, answers, strict=True)):
        if i in (7, 100):
            assert row["error"] == answer.reason and row["labels"] is None
        else:
            same(row, answer)


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(run_folder, many, tmp_path):
    out = tmp_path / "out"
    process = start(run_folder, many, out)
    wait_for_parts(process, out, 2)
    workers = workers_of(process)
    assert len(workers) == 2
    first = workers[0]
    first.kill()
    assert len(list(out.glob("*.parquet"))) < 32  # in the middle of the job
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    result = json.loads(text)
    assert [result[key] for key in ("images", "answered", "errors", "parts")] == [160, 158, 2, 32]
    assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE
    check_against_the_local_engine(run_folder, many, out)


DEADLY = """
import os, signal, sys
from glsim import cli
from glsim.inference import ray_bulk

class Deadly(ray_bulk.Worker):
    def answer(self, part, paths):
        if part == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(part, paths)

ray_bulk.Worker = Deadly
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_part_that_kills_every_worker_ends_the_job_and_spoils_no_other(run_folder, photos, tmp_path):
    pytest.importorskip("ray", reason="the extra `scale` is not installed", exc_type=ImportError)
    out = tmp_path / "out"
    words = ["predict", "bulk", run_folder, photos, "--workers", "2", "--part-size", "3", "--out", out]
    ended = subprocess.run(
        [sys.executable, "-c", DEADLY, *map(str, words)], capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 1 and "Ray stopped: " in ended.stderr, ended.stderr
    assert "the same command goes on" in ended.stderr and "Traceback" not in ended.stderr
    assert sorted(p.name for p in out.glob("*.parquet")) == ["part-000000.parquet", "part-000002.parquet"]


@pytest.mark.slow
def test_a_terminated_job_shuts_ray_down(run_folder, many, tmp_path):
    out = tmp_path / "out"
    process = start(run_folder, many, out)
    wait_for_parts(process, out, 1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and json.loads(text)["exit_code"] == 130, errors
    assert "Traceback" not in errors and "SIGTERM received" not in errors
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert [path.name for path in out.glob(".*")] == [MARKER]


@pytest.mark.slow
def test_a_killed_job_leaves_nothing_running_and_goes_on(run_folder, many, tmp_path):
    out = tmp_path / "out"
    process = start(run_folder, many, out)
    wait_for_parts(process, out, 3)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # alone
    process.communicate()
    assert not psutil.wait_procs(family, timeout=30)[1]
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert 3 <= len(before) < 32
    process = start(run_folder, many, out)
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(text)["parts_before"] == len(before)
    assert all((out / name).stat().st_mtime_ns == when for name, when in before.items())
    check_against_the_local_engine(run_folder, many, out)
