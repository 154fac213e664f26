"""Exported graphs answer like the model they were made from; anything else that calls itself one is refused."""

import json
import os
import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import small_model
from onnx import TensorProto, helper
from PIL import Image
from test_models import BACKBONES, MAPS, takes

import glsim
from glsim import ConfigError, DataError, GlsimError, cli
from glsim.checkpoints import export, onnx_runtime
from glsim.cli import bench
from glsim.cli.export import Options
from glsim.data.images import BadImage
from glsim.evaluation.evaluate import evaluate_bundle
from glsim.evaluation.peak_memory import peaks_here
from glsim.evaluation.speed import compare_speed
from glsim.evaluation.workloads import Job
from glsim.files import document
from glsim.inference.predictor import predict_images
from glsim.models.heads import NO_ANSWER, top2_margin

LABELS = list("abcde")
CLASS_TOKEN, REGISTERS, NEITHER = (
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
)


def exported(model, folder, ending=".onnx", **settings):
    """The file a model was exported to, and what the verb returned."""
    glsim.save(model, folder / "bundle", LABELS)
    out = folder / f"model{ending}"
    return out, export.export_model(folder / "bundle", out, **settings)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An exported GLSim on a ViT with class token; its bundle lies beside it. Not to be changed."""
    return exported(small_model(), tmp_path_factory.mktemp("graph"))[0]


def session(file):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def agrees(model, file, batches=(1, 3, 8)):
    """ONNX Runtime by itself against the model, on images no export has seen."""
    runtime = session(file)
    for count in batches:
        images = torch.randn(count, 3, *model.config.image_size, generator=torch.Generator().manual_seed(100 + count))
        output = model(images)
        logits, *boxes = runtime.run(None, {"images": images.numpy()})
        assert np.abs(logits - output.logits.detach().numpy()).max() <= 1e-4
        assert (boxes == []) == (output.selection is None)
        if boxes:
            assert (boxes[0] == output.selection.boxes.numpy()).all()


def test_a_graph_answers_like_glsim_with_a_class_token(file):
    agrees(small_model(), file)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "size"), [(REGISTERS, (56, 70)), (NEITHER, 64)])
def test_a_graph_answers_like_glsim(backbone, size, tmp_path):
    model = small_model(backbone=backbone, size=size)
    out, result = exported(model, tmp_path)
    assert result.exit_code == 0 and [c.batch for c in result.checks] == [1, 3, 8]
    assert all(c.difference <= 1e-4 and c.same_boxes == c.batch for c in result.checks)
    agrees(model, out)


EVERY = [(m, "resnet18" if m == "cal" else CLASS_TOKEN) for m in glsim.METHODS if m != "glsim"]
EVERY += [("glsim", b) for b in (*BACKBONES, *MAPS) if takes("glsim", b) and b not in (CLASS_TOKEN, REGISTERS, NEITHER)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "backbone"), EVERY)
def test_every_method_and_family_exports(method, backbone, tmp_path):
    size = (BACKBONES | MAPS)[backbone]
    model = small_model(method, backbone, size, **({"top_o": 1} if backbone in MAPS and method == "glsim" else {}))
    out, result = exported(model, tmp_path)
    assert result.exit_code == 0
    agrees(model, out)


@pytest.mark.slow
def test_a_graph_with_a_first_pass_of_its_own_size_takes_the_whole_image(tmp_path):
    model = small_model(size=128, first_size=64, metric="gls_border", box="moments")
    agrees(model, exported(model, tmp_path)[0])


@pytest.mark.parametrize(  # one that reads attention is always tried
    "metric",
    [
        "rollout",
        *(pytest.param(m, marks=pytest.mark.slow) for m in glsim.METRICS if m not in ("gls_border", "rollout")),
    ],
)
def test_every_metric_exports(metric, tmp_path):
    model = small_model(metric=metric, crop_size=[32, 48], classifier="max_cls", box="inclusive")
    agrees(model, exported(model, tmp_path)[0])


def test_what_a_graph_says_of_itself(file):
    runtime = session(file)
    (images,) = runtime.get_inputs()
    assert images.name == "images" and isinstance(images.shape[0], str) and images.shape[1:] == [3, 64, 64]
    assert [o.name for o in runtime.get_outputs()] == ["logits", "boxes"]
    said = {k: json.loads(v) for k, v in runtime.get_modelmeta().custom_metadata_map.items()}
    bundle = json.loads((file.parent / "bundle" / "config.json").read_text())
    assert said["label_names"] == LABELS and said["preprocessing"] == bundle["preprocessing"]
    assert (said["method"], said["options"], said["graphs"]) == ("glsim", bundle["options"], [])


def test_verbs_take_a_graph_for_a_bundle(run_folder, birds, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    assert cli.main(["export", str(run_folder), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)  # one document, nothing of the exporter's beside it
    assert said["files"] == [str(out)] and said["bytes"] == out.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]

    bundle = evaluate_bundle(run_folder, birds, workers=0)
    graph = evaluate_bundle(out, birds, workers=0)
    assert {k: getattr(graph, k) for k in ("count", "correct", "correct_top5", "per_class")} == {
        k: getattr(bundle, k) for k in ("count", "correct", "correct_top5", "per_class")
    }
    paths = sorted((birds / "test").rglob("*.jpg"))
    for a, b in zip(glsim.Predictor(run_folder)(paths), glsim.Predictor(out)(paths), strict=True):
        assert (a.labels, a.box) == (b.labels, b.box) and a.probabilities == pytest.approx(b.probabilities, abs=1e-5)
    # What looks into the network says that it needs one.
    for words in (["explain", out, paths[0], "--out", tmp_path / "p"], ["export", out, "--out", tmp_path / "x.onnx"]):
        assert cli.main([str(w) for w in words]) == 2
        assert f"{out} is " in capsys.readouterr().err


def test_bench_takes_a_graph_beside_its_bundle(file, birds, tmp_path):
    bundle = str(file.parent / "bundle")
    given = {"sources": [bundle, str(file)], "against": bundle, "batch_sizes": [2], "repeats": 1, "warmup": 0}
    given |= {"data": str(birds), "images": 5, "workers": 0, "memory": False, "device": "cpu", "out": str(tmp_path)}
    result = compare_speed(bench.Options(**given))
    mine, graph = result.rows
    assert document(mine).keys() - document(graph).keys() == {"parameters", "training_ms", "training_quartiles_ms"}
    assert (graph.backbone, graph.image_size) == (mine.backbone, mine.image_size)
    assert 0 < graph.latency_ms == pytest.approx(2000 / graph.images_per_second)
    (ratio,) = result.ratio
    assert ratio.latency == graph.latency_ms / mine.latency_ms and ratio.training is None
    assert "x latency" in bench.show(result, bench.Options())
    found = peaks_here(Job(str(file), "", 0, 1, "float32", False), bench.Options(sources=[str(file)], device="cpu"))
    assert list(found) == ["memory_mib"]  # there is nothing to train
    given |= {"sources": [str(file)], "against": None, "dtypes": ["bfloat16"], "compile": "both"}
    rows = compare_speed(bench.Options(**given)).rows
    assert all("is exported and runs as it is: --device cpu --dtypes float32" in row.error for row in rows)


def test_a_graph_only_answers(file):
    model = glsim.load(file)
    assert isinstance(model, onnx_runtime.GraphModel) and not model.training
    for use in (lambda: model.features(torch.zeros(1, 3, 64, 64)), model.state_dict, lambda: model.backbone):
        with pytest.raises(ConfigError, match=r"model.onnx is an exported graph: it only answers; use the bundle"):
            use()
    with pytest.raises(ConfigError, match="is exported and takes no top_o; export the bundle again"):
        glsim.load(file, top_o=2)


def test_a_program_of_torch(tmp_path):
    model = small_model("plain")
    out, result = exported(model, tmp_path, ".pt2")
    assert result.format == "torch" and result.exit_code == 0
    extra = {"config.json": ""}
    program = torch.export.load(out, extra_files=extra).module()
    images = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program(images)[0], model(images).logits)
    config = json.loads(extra["config.json"])
    assert config["label_names"] == LABELS and config["outputs"] == ["logits"]
    with pytest.raises(DataError, match="is no bundle folder, .pth or .onnx file"):  # it may hold pickles
        glsim.load(out)


@pytest.mark.slow
def test_eight_bits_are_smaller_and_nearly_right(file, tmp_path):
    out, result = exported(small_model(), tmp_path, precision="int8")
    assert result.exit_code == 0 and result.tolerance is None
    weights = sum(p.numel() for p in small_model().parameters())
    assert out.stat().st_size < file.stat().st_size - 2 * weights  # of four bytes a weight, one is left
    images = torch.randn(4, 3, 64, 64)
    mine, theirs = small_model()(images), glsim.load(out)(images)
    assert 1e-4 < (mine.logits - theirs.logits).abs().max() < 0.1 * mine.logits.abs().max()
    assert glsim.load(out).config.label_names == LABELS


def test_weights_too_large_for_one_file_lie_beside_it(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "LARGEST_FILE", 1000)
    model = small_model("plain")
    out, result = exported(model, tmp_path)
    assert result.files == [f"{out}.data", str(out)] and result.bytes > 4 * sum(p.numel() for p in model.parameters())
    assert out.stat().st_size < out.with_name("model.onnx.data").stat().st_size
    moved = shutil.copytree(tmp_path, tmp_path.with_name("moved"), ignore=shutil.ignore_patterns("bundle"))
    shutil.rmtree(tmp_path)
    agrees(model, moved / out.name)
    with pytest.raises(ConfigError, match=r"precision=int8: [\d,]+ bytes of weights, more than one ONNX file holds"):
        exported(model, tmp_path, precision="int8")


def test_a_model_that_answers_early_is_two_graphs(tmp_path):
    def adaptive(margin):
        return small_model(early_loss=1.0, margin=margin)

    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    ahead = top2_margin(adaptive(0.5).first_pass(images)[1]).detach().sort().values
    model = adaptive(float(ahead[3:5].mean()))  # half of the images are sure after the first pass
    out, result = exported(model, tmp_path)
    assert [p.rpartition("/")[2] for p in result.files] == ["model.2.onnx", "model.onnx"]
    assert result.exit_code == 0 and all(c.same_boxes == c.batch for c in result.checks)
    graph = glsim.load(out)
    for part, unsure in ((slice(None), 4), (torch.arange(7, -1, -1), 4), (slice(2, 3), None)):
        mine, theirs = model(images[part]), graph(images[part])
        assert torch.equal(mine.needs_second_pass, theirs.needs_second_pass)
        assert unsure is None or int(theirs.needs_second_pass.sum()) == unsure
        assert torch.equal(mine.selection.boxes, theirs.selection.boxes)
        torch.testing.assert_close(theirs.logits, mine.logits, atol=1e-4, rtol=0)
    sure = images[~model(images).needs_second_pass]
    torch.testing.assert_close(
        graph(sure).logits, model.first_pass(sure)[1], atol=1e-4, rtol=0
    )  # no second pass at all
    with pytest.raises(ConfigError, match="is two graphs; export it as ONNX"):
        exported(model, tmp_path, ".pt2")
    second = onnx.load(out.with_name("model.2.onnx"))
    helper.set_model_props(second, {"weights": '"of another export"'})
    onnx.save(second, out.with_name("model.2.onnx"))
    with pytest.raises(DataError, match=r"model.2.onnx was exported from another model than .*model.onnx; export it"):
        glsim.load(out)
    out.with_name("model.2.onnx").unlink()
    with pytest.raises(DataError, match=r"model.2.onnx cannot be read"):
        glsim.load(out)
    told = onnx.load(out)
    for name in ("../model.2.onnx", "..", "", "/etc/model.onnx"):
        helper.set_model_props(told, {"graphs": json.dumps([name])})
        onnx.save(told, out)
        with pytest.raises(DataError, match="was refused: one graph may follow it, of a name of its own and beside it"):
            glsim.load(out)


class Different(torch.nn.Module):
    """A graph that is not what the model does: what an exporter's mistake looks like."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        logits, *boxes = self.answer(images)
        return (logits + 2e-4, *boxes)


@pytest.mark.parametrize("ending", [pytest.param(".onnx", marks=pytest.mark.slow), ".pt2"])
def test_a_graph_that_answers_otherwise_is_not_written(ending, monkeypatch, tmp_path, capsys):
    right = export.make_graphs

    def wrong(model):
        (graph,) = right(model)
        return [graph._replace(module=Different(graph.module))]

    monkeypatch.setattr(export, "make_graphs", wrong)
    glsim.save(small_model("plain"), tmp_path / "bundle", LABELS)
    out = tmp_path / f"model{ending}"
    out.write_text("an earlier one")
    assert cli.main(["export", str(tmp_path / "bundle"), "--out", str(out)]) == 4
    said = capsys.readouterr().out
    assert (
        "batch 8: logits differ by at most 2.0e-04" in said
        and f"more than 0.0001: nothing was written to {out}" in said
    )
    assert out.read_text() == "an earlier one" and sorted(p.name for p in tmp_path.iterdir()) == ["bundle", out.name]


def test_what_cannot_be_exported_says_why(monkeypatch, tmp_path):
    class Sorted(torch.nn.Module):
        def forward(self, images):
            return (torch.linalg.svdvals(images.flatten(1)[:, None]),)

    monkeypatch.setattr(
        export, "make_graphs", lambda _: [export.Graph(Sorted(), {"images": torch.rand(2, 3, 64, 64)}, ("logits",))]
    )
    with pytest.raises(GlsimError, match=r"torch cannot write this model as ONNX: No ONNX function found for .*svd"):
        exported(small_model("plain"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_without_the_extra(monkeypatch, tmp_path, file):
    with monkeypatch.context() as patch:
        patch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
        with pytest.raises(ConfigError, match=r"ONNX needs onnxscript: pip install 'glsim\[export\]'"):
            exported(small_model("plain"), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"model.onnx needs ONNX Runtime .*: pip install 'glsim\[export\]'"):
        glsim.load(file)


def test_settings():
    assert Options(source="b", out="m.onnx").format == "onnx" and Options(source="b", out="m.pt2").format == "torch"
    for wrong in (
        {"out": "m.bin"},
        {"out": "m"},
        {"out": "m.onnx", "format": "torch"},
        {"out": "m.pt2", "format": "onnx"},
    ):
        with pytest.raises(ConfigError, match=r"name a file that ends in .onnx \(format onnx\) or .pt2"):
            Options(source="b", **wrong)
    with pytest.raises(ConfigError, match="precision=int8 is for ONNX"):
        Options(source="b", out="m.pt2", precision="int8")


def foreign(path, metadata=None, location=None):
    """A small graph that glsim did not make; with `location`, its weights are said to lie there."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], raw_data=b"\0" * 16)
    if location:
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        weight.external_data.add(key="location", value=location)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4]) for name in ("images", "answers")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["images", "w"], ["answers"])], "g", *[[v] for v in values], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    path.write_bytes(model.SerializeToString())
    return path


def test_damage_and_strangers_are_refused(file, tmp_path):
    whole = file.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "pickle.onnx").write_bytes(b"\x80\x04\x95\x1a\x00")
    for name in ("cut", "empty", "pickle"):
        with pytest.raises(DataError, match=rf"{name}.onnx (cannot be read|was not exported)"):
            glsim.load(tmp_path / f"{name}.onnx")
    with pytest.raises(DataError, match="was not exported by glsim: .*its outputs are answers"):
        glsim.load(foreign(tmp_path / "foreign.onnx"))
    with pytest.raises(DataError, match="was not exported by glsim: its metadata cannot be read"):
        glsim.load(foreign(tmp_path / "foreign.onnx", {"graphs": "{"}))
    (tmp_path / "secret").write_bytes(b"\0" * 16)
    (tmp_path / "inner").mkdir()
    for location in ("../secret", str(tmp_path / "secret")):
        with pytest.raises(DataError, match=r"cannot be read: .*(escapes|Absolute path)"):
            glsim.load(foreign(tmp_path / "inner" / "out.onnx", location=location))
    told = onnx.load(file)
    config = {p.key: p.value for p in told.metadata_props}
    for change, message in (
        ({"label_names": '["a"]'}, "1 label_names for 5 classes"),
        ({"image_size": "[64, 10000000]"}, "is damaged: image_size="),
        ({"preprocessing": "{}"}, "is damaged: preprocessing"),
    ):
        helper.set_model_props(told, config | change)
        onnx.save(told, tmp_path / "x.onnx")
        with pytest.raises(DataError, match=message):
            glsim.load(tmp_path / "x.onnx")


def graph_of(path, config, nodes, outputs, inputs=(("images", TensorProto.FLOAT, ["b", 3, 64, 64]),), **weights):
    """A graph with that metadata; `inputs` and `outputs` are (name, type, shape)."""
    values = [[helper.make_tensor_value_info(*value) for value in part] for part in (inputs, outputs)]
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", *values, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {key: json.dumps(value) for key, value in config.items()})
    path.write_bytes(model.SerializeToString())
    return path


def five_logits():
    """Nodes that give five logits, the mean of the image times a weight, and their weights."""
    return [
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["logits"]),
    ], {"axes": np.array([2, 3]), "w": np.ones((3, 5), np.float32)}


FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
LOGITS = ("logits", FLOAT, ["b", 5])


@pytest.fixture(scope="module")
def metadata(file):
    return {p.key: json.loads(p.value) for p in onnx.load(file).metadata_props}


def test_a_graph_of_the_right_shapes_is_taken(metadata, tmp_path):
    nodes, weights = five_logits()
    graph = glsim.load(graph_of(tmp_path / "m.onnx", metadata, nodes, [LOGITS], **weights))
    assert torch.equal(graph(torch.ones(3, 3, 64, 64)).logits, torch.full((3, 5), 3.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_classes": 7, "label_names": list("abcdefg")}, r"logits is .* \(b, 5\); tensor\(float\) \(any, 7\)"),
        ({"num_classes": 9, "label_names": None}, "does not fit its metadata: logits"),
        ({"num_classes": 3, "label_names": list("abc")}, "does not fit its metadata: logits"),
        ({"num_classes": 10**9, "label_names": None}, "does not fit its metadata: logits"),
        ({"image_size": [96, 96]}, "preprocessing.image_size is"),
        ({"num_classes": True}, "is damaged: num_classes=True"),
        ({"calibration": {"temperature": float("nan")}}, "its metadata cannot be read: NaN is no JSON"),
        ({"graphs": 5}, "is damaged: graphs=5"),
        ({"graphs": ["a.onnx", "b.onnx"]}, "one graph may follow it"),
        ({"graphs": ["m.onnx"]}, "one graph may follow it"),
    ],
)
def test_metadata_that_does_not_fit_the_graph_is_refused(metadata, tmp_path, changes, said):
    nodes, weights = five_logits()
    path = graph_of(tmp_path / "m.onnx", metadata | changes, nodes, [LOGITS], **weights)
    with pytest.raises(DataError, match=rf"m.onnx .*{said}"):
        glsim.load(path)


def test_shapes_and_types_that_no_export_has_are_refused(metadata, tmp_path):
    nodes, weights = five_logits()
    shape = helper.make_node("Shape", ["images"], ["boxes"])
    flat = helper.make_node("ReduceSum", ["images"], ["logits"], keepdims=0)
    cast = [*nodes[:1], helper.make_node("MatMul", ["mean", "w"], ["x"])]
    cast.append(helper.make_node("Cast", ["x"], ["logits"], to=TensorProto.DOUBLE))
    wrong = helper.make_node("Reshape", ["images", "to"], ["logits"])
    lit = [helper.make_node("NonZero", ["images"], ["n"]), helper.make_node("Transpose", ["n"], ["boxes"])]
    named = helper.make_node("Shape", ["images"], ["x"])
    images = "images", FLOAT, ["b", 3, 64, 64]
    for name, given, outputs, inputs, more, said in (
        ("rank", [flat], [("logits", FLOAT, [])], [images], {}, r"logits is tensor\(float\) \(\)"),
        ("dtype", cast, [("logits", TensorProto.DOUBLE, ["b", 5])], [images], weights, r"logits is tensor\(double\)"),
        ("size", nodes, [LOGITS], [("images", FLOAT, ["b", 3, 32, 32])], weights, "images is .*32"),
        ("batch", nodes, [("logits", FLOAT, [1, 5])], [("images", FLOAT, [1, 3, 64, 64])], weights, "any number of im"),
        (
            "boxes",
            [*nodes, shape],
            [LOGITS, ("boxes", INT64, [4])],
            [images],
            weights,
            r"boxes is tensor\(int64\) \(4\)",
        ),
        ("more", [*nodes, named], [LOGITS, ("x", INT64, [4])], [images], weights, "its outputs are logits, x"),
        ("lit", [*nodes, *lit], [LOGITS, ("boxes", INT64, ["n", 4])], [images], weights, r"for two images .*\(0, 4\)"),
        ("inside", [wrong], [LOGITS], [images], {"to": np.array([-1, 5])}, "fails in ONNX Runtime"),
    ):
        path = graph_of(tmp_path / f"{name}.onnx", metadata, given, outputs, inputs, **more)
        with pytest.raises(DataError, match=rf"{name}.onnx .*{said}"):
            glsim.load(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_graph_whose_weights_are_no_numbers_is_refused(metadata, tmp_path, value):
    nodes, weights = five_logits()
    weights["w"][0, 0] = value
    with pytest.raises(DataError, match="logits of a blank image are no numbers"):
        glsim.load(graph_of(tmp_path / "m.onnx", metadata, nodes, [LOGITS], **weights))


def test_an_answer_that_is_no_number_is_an_error_of_its_image(metadata, tmp_path, birds):
    """The logits of a bright image overflow, those of a dark one do not: in predict, and in eval."""
    nodes, weights = five_logits()
    nodes[1].input[0] = "large"
    nodes.insert(1, helper.make_node("Exp", ["scaled"], ["large"]))
    nodes.insert(1, helper.make_node("Mul", ["mean", "ten"], ["scaled"]))
    plain = metadata | {"preprocessing": metadata["preprocessing"] | {"mean": [0.0] * 3, "std": [1.0] * 3}}
    path = graph_of(tmp_path / "m.onnx", plain, nodes, [LOGITS], ten=np.float32(200), **weights)
    images = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white", (20, 20, 20))]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    said = list(glsim.Predictor(path).stream(paths))
    assert [isinstance(answer, BadImage) for answer in said] == [False, True, False]
    assert str(said[1]) == f"{paths[1]}: {NO_ANSWER}"
    with pytest.raises(BadImage, match=r"1.png: the model's answer is no number"):
        predict_images(path, paths, workers=0)
    result = predict_images(path, paths, workers=0, skip_bad=True)
    assert [a.path for a in result.predictions] == [paths[0], paths[2]] and len(result.skipped) == 1
    json.dumps(document(result), allow_nan=False)
    for split, names in (("train", "abcde"), ("test", "abcde")):
        for i, name in enumerate(names):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            images[1 if split == "test" and i == 3 else 0].save(tmp_path / "data" / split / name / "x.png")
    with pytest.raises(DataError, match=r"d/x.png: the model's answer is no number: .*; so for 1 of 5 images"):
        evaluate_bundle(path, tmp_path / "data", workers=0)


@pytest.mark.timeout(60)
def test_a_graph_that_is_no_file_is_refused(metadata, tmp_path):
    nodes, weights = five_logits()
    path = graph_of(tmp_path / "m.onnx", metadata | {"graphs": ["m.2.onnx"]}, nodes, [LOGITS], **weights)
    os.mkfifo(tmp_path / "m.2.onnx")
    with pytest.raises(DataError, match=r"m.2.onnx cannot be read: .*not a regular file"):
        glsim.load(path)
