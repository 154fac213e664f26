import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from conftest import scene, small_model

import glsim
from glsim import cli
from glsim.checkpoints.bundle import digest
from glsim.checkpoints.onnx_runtime import GraphModel, as_output
from glsim.data.images import BadImage, open_image
from glsim.evaluation import evaluate
from glsim.inference import index, index_vectors
from glsim.inference.index import Encoded, add_to_index, build_index, encode, query_index
from glsim.inference.index_evaluation import ScoreAuroc, auroc, evaluate_index, tell_unknown
from glsim.inference.index_vectors import Index, nearest, prototypes, read_index, unit, vote
from glsim.inference.predictor import embedding_of
from glsim.types import ConfigError, DataError, GlsimError


def cloud(count, width=8, seed=0):
    return unit(np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32))


def make(vectors, labels, classes):
    paths = tuple(f"/x/{i}.jpg" for i in range(len(labels)))
    return Index("global", "w", "m", tuple(classes), np.array(labels, np.int64), paths, vectors)


# --- searching, against loops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_a_time", [None, (1, 3), (2, 39), (7, 40), (8, 7)])
def test_nearest_is_what_a_loop_over_cosines_finds(monkeypatch, at_a_time):
    if at_a_time:
        monkeypatch.setattr(index_vectors, "QUERIES", at_a_time[0])
        monkeypatch.setattr(index_vectors, "ROWS", at_a_time[1])
    gallery, queries = cloud(40), cloud(7, seed=1)
    similarities, rows = nearest(gallery, queries, 5)
    for q, found, values in zip(queries, rows, similarities, strict=True):
        cosines = [float(np.dot(q, g) / np.linalg.norm(q) / np.linalg.norm(g)) for g in gallery]
        best = sorted(range(40), key=lambda i: -cosines[i])[:5]
        assert found.tolist() == best
        assert values == pytest.approx([cosines[i] for i in best], abs=1e-5)
    assert nearest(gallery, queries, 99)[1].shape == (7, 40)


def test_prototypes_are_the_mean_directions_of_the_classes_that_are_there():
    vectors, labels = cloud(20), np.array([3, 0, 3, 5] * 5)
    means, classes = prototypes(vectors, labels)
    assert classes.tolist() == [0, 3, 5]
    for mean, c in zip(means, classes, strict=True):
        total = sum(v for v, label in zip(vectors, labels, strict=True) if label == c)
        assert mean == pytest.approx(total / np.linalg.norm(total), abs=1e-6)


def test_neighbours_vote_by_their_similarity():
    similarities = np.array([[0.9, 0.8, 0.79, 0.5], [0.9, 0.5, 0.1, 0.0]], np.float32)
    labels = np.array([[1, 2, 2, 0], [1, 2, 2, 2]])
    winners, shares = vote(similarities, labels)
    for row in range(2):
        weight = {}
        for s, label in zip(similarities[row], labels[row], strict=True):
            weight[label] = weight.get(label, 0) + np.exp(s / index_vectors.TEMPERATURE)
        best = max(weight, key=weight.get)
        assert winners[row] == best
        assert shares[row] == pytest.approx(weight[best] / sum(weight.values()), abs=1e-4)
    close = np.array([[0.9, 0.89, 0.89]], np.float32)  # two a little farther away outvote one
    assert vote(close, np.array([[1, 2, 2]]))[0].tolist() == [2]


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, known = rng.integers(-5, 30, 60).astype(np.float32), rng.random(60) < 0.6
    pairs = list(product(scores[known], scores[~known]))
    assert auroc(scores, known) == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs), abs=1e-6)
    assert auroc(np.array([3000.0, 2999.9, 1.0], np.float32), np.array([True, False, False])) == 1.0


def test_the_unknown_is_told_by_the_similarity_of_the_best_prototype():
    axes = np.eye(4, dtype=np.float32)
    known_index = make(axes[:2], [0, 1], "ab")
    vectors = unit(np.concatenate((axes[[0, 1] * 10] + 0.1, axes[[2, 3]])).astype(np.float32))
    flat = np.full(22, 0.5, np.float32)
    encoded = Encoded(list(range(22)), vectors, np.zeros(22, np.int64), flat, flat, [])
    result = tell_unknown(known_index, encoded, np.arange(22) < 20)
    assert result.auroc == ScoreAuroc(prototypes=1.0, softmax=0.5, energy=0.5)
    assert result.count == 2 and result.passed == 0.0
    assert tell_unknown(known_index, encoded, np.ones(22, bool)) is None


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_an_index_comes_back_as_it_was_saved(tmp_path):
    before = make(cloud(6), [0, 1, 1, 2, 0, 2], ["häher", "b", "c"])
    before.save(tmp_path)
    after = read_index(tmp_path)
    assert (after.classes, after.paths, after.embedding) == (before.classes, before.paths, before.embedding)
    assert np.array_equal(after.vectors, before.vectors) and np.array_equal(after.labels, before.labels)


def test_images_are_added_once_and_belong_to_one_class(tmp_path):
    start = make(cloud(2), [0, 1], ["a", "b"])
    more = start.add(["c", "a", "b", "c"], ["/n/1", "/x/0.jpg", "/n/2", "/n/1"], cloud(4, seed=3))
    assert more.classes == ("a", "b", "c") and more.paths == ("/x/0.jpg", "/x/1.jpg", "/n/1", "/n/2")
    assert more.labels.tolist() == [0, 1, 2, 1]
    assert np.array_equal(more.vectors[2:], cloud(4, seed=3)[[0, 2]])
    with pytest.raises(DataError, match=r"/x/0.jpg is in the index as 'a' already; it cannot be 'b'"):
        start.add(["b"], ["/x/0.jpg"], cloud(1))
    with pytest.raises(DataError, match=r"/n/1 is in the index as 'c'"):
        start.add(["c", "b"], ["/n/1", "/n/1"], cloud(2))


def stored(folder, data):
    """An index of three images whose vectors file is `data`, with the right hash."""
    make(cloud(3), [0, 1, 1], ["a", "b"]).save(folder)
    name = f"vectors-{hashlib.sha256(data).hexdigest()}.safetensors"
    (folder / name).write_bytes(data)
    spoil(folder, vectors=name)
    return folder


NO_UNIT = [np.full((3, 8), v, np.float32) for v in (np.nan, np.inf, 1e30, 5.0)]


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        *((v, "was refused: not every vector has unit length") for v in NO_UNIT),
        (cloud(3).astype(np.float64), r"is damaged: float64 \(3, 8\) for 3 images"),
        (cloud(3).astype(np.float16), "is damaged: float16"),
        (cloud(4), r"is damaged: float32 \(4, 8\) for 3 images"),
        (cloud(3)[0], "is damaged: float32"),
    ],
)
def test_vectors_of_another_kind_are_refused(tmp_path, vectors, said):
    with pytest.raises(DataError, match=said):
        read_index(stored(tmp_path, safetensors.numpy.save({"vectors": vectors})))


def test_vectors_of_bfloat16_or_another_name_are_refused(tmp_path):
    kinds = {
        "bfloat16": safetensors.torch.save({"vectors": torch.zeros(3, 8, dtype=torch.bfloat16)}),
        "name": safetensors.numpy.save({"other": cloud(3)}),
        "none": b"no tensors",
    }
    for kind, data in kinds.items():
        with pytest.raises(DataError, match=r"vectors-.* is damaged"):
            read_index(stored(tmp_path / kind, data))


@pytest.mark.timeout(60)
def test_only_regular_files_of_an_index_are_opened(tmp_path):
    make(cloud(3), [0, 1, 1], ["a", "b"]).save(tmp_path)
    for file in (next(tmp_path.glob("vectors-*")), tmp_path / "index.json"):
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(DataError, match=rf"{file.name} is damaged or .*not a regular file"):
            read_index(tmp_path)


def test_a_model_that_a_file_names_is_not_fetched(tmp_path, monkeypatch):
    make(cloud(3), [0, 1, 1], ["a", "b"]).save(tmp_path)
    asked = []
    monkeypatch.setattr(index, "load", lambda source: asked.append(source) or small_model())
    for source in ("hf-hub:owner/x", "local-dir:/x", "https://x/m.pth"):
        spoil(tmp_path, source=source)
        with pytest.raises(DataError, match=f"its model is {source}, and nothing is fetched .* --source {source}$"):
            query_index(tmp_path, ["x.jpg"])
    assert not asked
    with pytest.raises(ConfigError, match="was made with another model than hf-hub:owner/x"):
        query_index(tmp_path, ["x.jpg"], source="hf-hub:owner/x")
    assert asked == ["hf-hub:owner/x"]


def test_an_interrupted_change_leaves_the_older_state(tmp_path, monkeypatch):
    make(cloud(3), [0, 1, 1], ["a", "b"]).save(tmp_path)
    old = read_index(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_vectors, "write_text", full)
    with pytest.raises(OSError):
        old.add(["c"], ["/n"], cloud(1)).save(tmp_path)
    monkeypatch.undo()
    assert read_index(tmp_path).paths == old.paths
    old.add(["c"], ["/n"], cloud(1)).save(tmp_path)
    assert read_index(tmp_path).classes == ("a", "b", "c")
    spelt = old.add(["cafe\u0301"], ["/n"], cloud(1)).add(["caf\u00e9\u00a0", " a"], ["/m", "/o"], cloud(2))
    assert spelt.classes == ("a", "b", "caf\u00e9") and spelt.labels[-3:].tolist() == [2, 2, 0]
    older = replace(old, classes=("a", "cafe\u0301")).add(["caf\u00e9"], ["/n"], cloud(1))
    assert older.classes == ("a", "cafe\u0301") and older.labels[-1] == 1
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.name[0] != ".") == [
        ".json",
        ".safetensors",
    ]  # no leftovers


def test_two_changes_at_once_do_not_lose_one(tmp_path):
    make(cloud(3), [0, 1, 1], ["a", "b"]).save(tmp_path)
    mine, theirs = read_index(tmp_path), read_index(tmp_path)
    theirs.add(["c"], ["/t"], cloud(1)).save(tmp_path)
    with pytest.raises(GlsimError, match="changed by somebody else"):
        mine.add(["d"], ["/m"], cloud(1)).save(tmp_path)
    assert read_index(tmp_path).classes == ("a", "b", "c")


def test_a_change_waits_until_another_one_is_written(tmp_path, monkeypatch):
    make(cloud(3), [0, 1, 1], ["a", "b"]).save(tmp_path)
    mine, theirs = read_index(tmp_path), read_index(tmp_path)
    begun, going, real = Event(), Event(), index_vectors.write_text

    def slow(*arguments):
        begun.set()
        assert going.wait(20)
        real(*arguments)

    monkeypatch.setattr(index_vectors, "write_text", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(theirs.add(["c"], ["/t"], cloud(1)).save, tmp_path)
        assert begun.wait(20)
        second = pool.submit(mine.add(["d"], ["/m"], cloud(1, seed=1)).save, tmp_path)
        with pytest.raises(TimeoutError):
            second.result(0.3)
        going.set()
        first.result(20)
        with pytest.raises(GlsimError, match="changed by somebody else"):
            second.result(20)
    assert read_index(tmp_path).classes == ("a", "b", "c")


def spoil(folder, **changes):
    table = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({k: v for k, v in (table | changes).items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 99}, "upgrade glsim"),
        ({"weights": None}, "index.json is damaged: .*weights"),
        ({"images": [["/x/0.jpg", 7]]}, "is damaged: 1 images of 1 paths, 2 classes, the last of an image 7"),
        ({"images": [["/x/0.jpg"]]}, "is damaged"),
        ({"images": [["a", 0], ["b", 1], ["c", -1]]}, "is damaged"),
        ({"images": [["a", 0], ["a", 1], ["c", 1]]}, "3 images of 2 paths"),
        ({"images": [["a", True], ["b", 1], ["c", 1]]}, "is damaged: images="),
        ({"images": [["a", 10**30], ["b", 1], ["c", 1]]}, "is damaged"),
        ({"images": [[5, 0], ["b", 1], ["c", 1]]}, "is damaged: images="),
        ({"images": []}, "is damaged: images="),
        ({"classes": ["a", "a"]}, "is damaged: classes="),
        ({"classes": ["a", ""]}, "is damaged: classes="),
        ({"classes": "ab"}, "is damaged: classes="),
        ({"embedding": "other"}, "is damaged: embedding='other'"),
        ({"format": True}, "is damaged: format=True"),
        ({"source": 5}, "is damaged: source=5"),
        ({"vectors": "../outside.safetensors"}, "was refused: its vectors lie outside"),
        ({"vectors": "vectors-0.safetensors"}, "damaged or missing"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, changes, said):
    make(cloud(3), [0, 1, 1], ["a", "b"]).save(tmp_path / "i")
    spoil(tmp_path / "i", **changes)
    with pytest.raises(DataError, match=said):
        read_index(tmp_path / "i")


def test_damaged_vectors_are_refused(tmp_path):
    make(cloud(3), [0, 1, 1], ["a", "b"]).save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="its hash is not that of its name"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_index(tmp_path)
    with pytest.raises(DataError, match=r"is no index.*glsim index build"):
        read_index(tmp_path / "none")


# --- verbs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(run_folder, birds, tmp_path_factory):
    """A copy of the run with its index in it, and images of a class that the run never saw."""
    top = tmp_path_factory.mktemp("place")
    shutil.copytree(run_folder, top / "run")
    for split, count in (("train", 5), ("test", 4)):
        for i in range(count):
            file = top / "views" / split / "view" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            scene((64, 64), seed=i + 100 * (split == "test")).save(file)
    built = build_index(top / "run", birds, top / "run/index", workers=0)
    assert (built.images, built.classes, built.embedding) == (18, 3, "fused")
    return top


@pytest.fixture
def here(place, tmp_path):
    return shutil.copytree(place, tmp_path / "copy")


def test_a_class_of_five_images_is_recognised_at_once(here):
    folder, views = str(here / "run" / "index"), here / "views"
    asked = dict(workers=0, neighbours=3, top_k=2)
    before = query_index(folder, [str(views / "test")], **asked).answers
    assert not any("view" in [c.label for c in a.classes] for a in before)
    added = add_to_index(folder, [str(views / "train")], label="view", workers=0)
    assert (added.added, added.new_classes, added.images_of) == (5, ["view"], {"view": 5})
    for a in query_index(folder, [str(views / "test")], **asked).answers:
        assert a.label == "view" == a.vote.label and a.head.label != "view"
        assert [len(a.classes), len(a.neighbours)] == [2, 3]
        assert a.classes[0].similarity >= a.classes[1].similarity
        assert a.neighbours[0].label == "view" and "views/train/view" in a.neighbours[0].path
    again = add_to_index(folder, [str(views / "train")], workers=0)
    assert (again.added, again.there_before) == (0, 5)  # by the names of their folders, which is the same class


def test_vectors_of_another_width_are_refused(here, birds):
    folder, image = here / "run" / "index", str(next((birds / "test").rglob("*.jpg")))
    before = read_index(folder)
    wide = replace(before, vectors=cloud(len(before.labels), before.vectors.shape[1] + 1))
    wide.save(folder)
    for ask in (
        lambda: query_index(folder, [image], workers=0),
        lambda: add_to_index(folder, [image], workers=0),
        lambda: evaluate_index(folder, birds, workers=0),
    ):
        with pytest.raises(
            DataError, match=r"is damaged: its vectors have 65 numbers, those of its model \(fused\) 64"
        ):
            ask()


def test_an_answer_that_is_no_number_gives_no_vector(here, birds, monkeypatch):
    paths = sorted((birds / "test").rglob("*.jpg"))[:3]
    model, outputs = glsim.load(here / "run"), glsim.Predictor.outputs

    def spoilt(self, images):
        for output, items in outputs(self, images):
            logits = output.logits.clone()
            logits[1] = torch.nan
            yield output._replace(logits=logits), items

    monkeypatch.setattr(glsim.Predictor, "outputs", spoilt)
    with pytest.raises(BadImage, match=f"{paths[1].name}: the model's answer is no number"):
        encode(model, paths, "fused")
    encoded = encode(model, paths, "fused", skip_bad=True)
    assert encoded.places == [0, 2] and len(encoded.vectors) == len(encoded.guesses) == 2
    assert len(encoded.skipped) == 1 and np.isfinite(encoded.confidences).all()


def test_an_image_far_from_every_class_is_unknown(here, birds):
    folder = here / "run" / "index"
    one = query_index(folder, [str(here / "views" / "test" / "view" / "0.png")], workers=0).answers[0]
    best = one.classes[0].similarity
    assert one.label == one.classes[0].label
    for below, known in ((best + 1e-3, False), (best - 1e-3, True)):
        answer = query_index(folder, [one.path], below=below, workers=0).answers[0]
        assert (answer.label is not None) == known


def test_the_vectors_are_those_of_the_model(here, birds):
    stored = read_index(here / "run" / "index")
    predictor = glsim.Predictor(here / "run", embedding="fused")
    for path, vector in list(zip(stored.paths, stored.vectors, strict=True))[::5]:
        expected = np.array(predictor(path)[0].embedding)
        assert vector == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)


def test_eval_counts_the_head_as_glsim_eval_does(here, birds):
    result = evaluate_index(here / "run" / "index", birds, workers=0)
    plain = evaluate.evaluate_bundle(here / "run", birds, workers=0)
    assert result.count == 9 and result.head.top1 == pytest.approx(plain.top1)
    assert result.unknown is None and result.prototypes.top1_added is None
    stored = read_index(here / "run" / "index")
    hits = []
    predictor = glsim.Predictor(here / "run", embedding="fused")
    for answer in predictor(sorted((birds / "test").rglob("*.jpg"))):
        v = np.array(answer.embedding)
        order = np.argsort(-(stored.vectors @ (v / np.linalg.norm(v))))
        names = [stored.classes[stored.labels[i]] for i in order]
        hits.append([answer.path.split("/")[-2] in names[:k] for k in (1, 5, 10)])
    assert list(result.recall.values()) == pytest.approx(np.mean(hits, axis=0).tolist())


def test_eval_tells_the_unknown_until_it_is_added(here, birds):
    both = shutil.copytree(birds, here / "both")
    shutil.copytree(here / "views", both, dirs_exist_ok=True)
    folder = here / "run" / "index"
    unknown = evaluate_index(folder, both, workers=0).unknown
    answers = query_index(folder, [str(both / "test")], workers=0).answers
    for score, read in (
        (unknown.auroc.prototypes, lambda a: a.classes[0].similarity),
        (unknown.auroc.softmax, lambda a: a.head.probability),
    ):
        new = [read(a) for a in answers if "/view/" in a.path]
        old = [read(a) for a in answers if "/view/" not in a.path]
        assert unknown.count == len(new) == 4 and len(old) == 9
        pairs = [(a > b) + (a == b) / 2 for a, b in product(old, new)]
        assert score == pytest.approx(np.mean(pairs), abs=1e-6)
    add_to_index(folder, [str(here / "views" / "train")], workers=0)
    result = evaluate_index(folder, both, workers=0)
    assert result.unknown is None and result.count == 13
    assert (result.prototypes.top1_added, result.head.top1_added) == (1.0, 0.0)
    with pytest.raises(DataError, match="18 of the 18 images are in the index themselves"):
        evaluate_index(folder, birds, split="train", workers=0)


def test_run_and_index_travel_together(here, tmp_path, birds):
    moved = shutil.move(str(here / "run"), str(tmp_path / "elsewhere"))
    image = next((birds / "test").rglob("*.jpg"))
    assert query_index(f"{moved}/index", [str(image)], workers=0).answers
    alone = shutil.move(f"{moved}/index", str(tmp_path / "deep" / "er" / "index"))
    with pytest.raises(DataError, match="its model is no longer at .*--source"):
        shutil.rmtree(tmp_path / "deep" / "nothing", ignore_errors=True)
        spoil(tmp_path / "deep" / "er" / "index", source="../nothing")
        query_index(alone, [str(image)], workers=0)
    assert query_index(alone, [str(image)], source=moved, workers=0).answers


def test_an_index_of_another_model_is_refused(here, birds, tmp_path):
    other = glsim.save(small_model(classes=3), tmp_path / "other", labels=["a", "b", "c"])
    image = str(next((birds / "test").rglob("*.jpg")))
    with pytest.raises(ConfigError, match="was made with another model than .*other"):
        query_index(here / "run/index", [image], source=other, workers=0)


def test_the_hash_follows_every_weight_and_nothing_else():
    model = small_model()
    first = digest(model.state_dict())
    assert first == digest(small_model().state_dict()) and first != digest(small_model(seed=1).state_dict())
    model.head.linear.bias.data[0] += 1e-6
    assert digest(model.state_dict()) != first


def test_bad_files_and_wrong_options(here, birds, tmp_path):
    folder, new = here / "run" / "index", tmp_path / "new"
    new.mkdir()
    (new / "bad.jpg").write_bytes(b"")
    with pytest.raises(BadImage, match=r"bad.jpg: empty"):
        add_to_index(folder, [str(new)], workers=0)
    with pytest.raises(DataError, match="none of the 1 images can be read; the first: .*bad.jpg"):
        add_to_index(folder, [str(new)], workers=0, skip_bad=True)
    open_image(next((birds / "test").rglob("*.jpg"))).save(new / "good.png")
    added = add_to_index(folder, [str(new)], workers=0, skip_bad=True)
    assert added.added == 1 and len(added.skipped) == 1 and added.new_classes == ["new"]
    with pytest.raises(ConfigError, match="already holds an index"):
        build_index(here / "run", birds, folder, workers=0)
    plain = glsim.save(small_model("plain", classes=3), tmp_path / "plain")
    with pytest.raises(ConfigError, match="plain has no embedding 'crop'; it has: global"):
        build_index(plain, birds, tmp_path / "i", embedding="crop", workers=0)
    assert not (tmp_path / "i").exists()


def test_the_split_is_that_of_the_run_that_trained_the_model(birds, tmp_path):
    data = shutil.copytree(birds / "train", tmp_path / "birds")  # no split of its own
    names = sorted(p.name for p in data.iterdir())
    seen = {"split_seed": 5, "test_fraction": 0.34, "val_fraction": 0.3}
    source = glsim.save(small_model(classes=3), tmp_path / "m", names, data=seen)
    found = {}
    for split in ("train", "val", "test"):
        build_index(source, data, tmp_path / split, split=split, workers=0)
        found[split] = set(read_index(tmp_path / split).paths)
        wanted, _ = evaluate.read_split(glsim.load(source), data, split)
        assert found[split] == {str(path) for path in wanted.paths}
    assert [len(paths) for paths in found.values()] == [9, 3, 6] and len(set.union(*found.values())) == 18
    assert evaluate_index(tmp_path / "train", data, split="val", workers=0).count == 3


def test_a_model_that_answers_early_is_indexed_by_both_passes(birds, tmp_path):
    """Also when it was calibrated after the index was built: the weights are the same."""
    names = sorted(p.name for p in (birds / "train").iterdir())
    source, found = tmp_path / "m", []
    for name, margin in (("before", None), ("after", 0.0)):
        model = small_model(classes=3, early_loss=1.0, margin=margin)
        glsim.save(model, source, names)
        build_index(source, birds, tmp_path / name, workers=0)
        found.append(read_index(tmp_path / name))
    assert found[0].embedding == found[1].embedding == "fused"
    assert found[1].vectors == pytest.approx(found[0].vectors, abs=1e-5)
    assert len(query_index(tmp_path / "before", [str(birds / "test")], workers=0).answers) == 9
    image = next((birds / "test").rglob("*.jpg"))
    for name in ("crop", "fused", "global"):
        (answer,) = glsim.Predictor(model, embedding=name)(image)
        assert answer.second_pass is (False if name == "global" else None) and answer.embedding
    assert model.margin == 0.0  # the caller's own stays as it was


def test_an_exported_graph_has_no_vectors(tmp_path):
    with pytest.raises(ConfigError, match=r"m.onnx is an exported graph.*use the bundle"):
        index.start_index(GraphModel([], {}, Path("m.onnx")), "m.onnx", tmp_path, None)
    with pytest.raises(ConfigError, match="embedding=fused: this model gives none"):
        embedding_of(as_output(torch.zeros(1, 3)), "fused")


def test_the_command_line(here, birds, capsys):
    folder, words = str(here / "run" / "index"), ["--workers", "0"]
    views = [str(p) for p in sorted((here / "views" / "train").rglob("*.png"))]
    assert cli.main(["index", "add", folder, "--label", "view", *views, *words]) == 0
    assert "view (new): 5 images" in capsys.readouterr().out
    assert cli.main(["index", "query", folder, str(here / "views" / "test"), *words]) == 0
    assert "0.png: view (view " in capsys.readouterr().out
    assert cli.main(["index", "eval", folder, "--data", str(birds), *words]) == 0
    out = capsys.readouterr().out
    assert "recall: @1" in out and "classes added" not in out
    assert cli.main(["index", "eval", folder, "--data", str(here / "views"), *words]) == 0
    assert "classes that the head knows, of classes added: prototypes -, 100.0%   " in capsys.readouterr().out
    shots = ["--shots", "1", "5", "--steps=3", "--seed", "7"]  # of an older version
    assert cli.main(["index", "eval", folder, "--data", str(birds), *shots, "--json", *words]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["count"] == 9 and "benchmarks/new_classes.py adds classes in steps" in printed.err
    assert cli.main(["index"]) == 2 and "unknown verb 'index'" in capsys.readouterr().err
    assert cli.main(["index", "--help"]) == 0 and "index build" in capsys.readouterr().out
    assert cli.main(["index", "query", folder, "x", "--below", "2"]) == 2
    assert "below=2.0: a cosine" in capsys.readouterr().err
