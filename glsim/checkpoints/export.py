"""Exports of a model (ONNX, torch.export), kept only if they answer like the model."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from glsim.checkpoints.bundle import digest, load, preprocessing_of
from glsim.checkpoints.onnx_runtime import BOXES, GIVEN, IMAGES, LOGITS, UNSURE, GraphModel, as_output, open_graph
from glsim.files import make_parent
from glsim.models.attention import explicit_attention
from glsim.models.base import EarlyExitModel, Model
from glsim.models.heads import top2_margin
from glsim.types import ConfigError, GlsimError, Output, choose

BATCHES = (1, 3, 8)  # images at a time with which an exported file is held to the model
TOLERANCE = 1e-4  # largest difference of a logit
LARGEST_FILE = (
    1_800_000_000  # bytes of weights in one ONNX file, whose format ends at 2 GiB; more go to a file beside it
)


class Graph(NamedTuple):
    """One graph of an export."""

    module: nn.Module  # tensors -> a tuple of tensors, the first dimension of each is the batch
    inputs: dict[str, Tensor]  # by name, with examples of two images
    outputs: tuple[str, ...]


class Answer(nn.Module):
    """Images (B, 3, H, W) -> logits (B, C) and, of a method that chooses patches, boxes (B, 4)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """`images` (B, 3, H, W), normalised."""
        with spelled_out(self.model):
            output = self.model(images)
        return (output.logits,) if output.selection is None else (output.logits, output.selection.boxes)


class First(Answer):
    """First pass of an `EarlyExitModel`: images -> logits, boxes, what the second pass is given, who needs it (B,)."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """`images` (B, 3, H, W), normalised."""
        with spelled_out(self.model):
            given, logits, selection = self.model.first_pass(images)
        return logits, selection.boxes, given, top2_margin(logits) < self.model.margin


class Second(Answer):
    """Its second pass: images, boxes and what the first one gave -> logits."""

    def forward(self, images: Tensor, boxes: Tensor, given: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Logits (B, C) of a second pass.

        Args:
            images: (B, 3, H, W), normalised.
            boxes: (B, 4), what to crop.
            given: (B, D), of the first pass.
        """
        with spelled_out(self.model):
            return (self.model.second_pass(images, given, boxes).logits,)


def spelled_out(model: Model) -> AbstractContextManager[Any]:
    """Inside, BEiT's attention with its bias is spelled out, which the exporter cannot take fused."""
    return explicit_attention(model) if isinstance(model.backbone.net, Beit) else nullcontext()


@torch.no_grad()
def make_graphs(model: Model) -> list[Graph]:
    """The graphs of a model, as `GraphModel` runs them one after the other.

    One, with both passes and the crop; of a `EarlyExitModel` with a margin one for each pass.
    """
    images = {IMAGES: torch.zeros(2, 3, *model.config.image_size)}
    if isinstance(model, EarlyExitModel) and model.margin is not None:
        names = (LOGITS, BOXES, GIVEN, UNSURE)
        values = dict(zip(names, First(model)(**images), strict=True))
        second = images | {name: values[name] for name in (BOXES, GIVEN)}
        return [Graph(First(model), images, names), Graph(Second(model), second, (LOGITS,))]
    return [Graph(Answer(model), images, (LOGITS, BOXES)[: len(Answer(model)(**images))])]


@dataclass(frozen=True)
class BatchCheck:
    """How the exported file answers a batch of random images, compared with the model."""

    batch: int  # images
    difference: float  # of the logits, largest
    same_answers: int  # of so many images
    same_boxes: int | None  # of so many images; None without boxes


@dataclass(frozen=True)
class ExportedModel:
    """What `export_model` returns."""

    out: str
    files: list[str]  # written: `out` last, before it those it refers to; none where a check did not hold
    bytes: int  # of all files
    format: str
    precision: str
    tolerance: float | None  # of the logits; None: the answers are not held to anything
    checks: list[BatchCheck]
    exit_code: int  # 4 where a logit differs by more than the tolerance


def export_model(
    source: str | Path,
    out: str | Path,
    *,
    format: str | None = None,  # noqa: A002
    precision: str = "float32",
) -> ExportedModel:
    """Write a model as one file that runs without glsim, and hold it to the model's answers.

    Args:
        source: what `glsim.load` takes, but no exported file.
        out: file to write; nothing is written where a logit differs by more than TOLERANCE.
        format: onnx or torch; default: by the ending of `out`, .onnx or .pt2.
        precision: float32, or int8 for ONNX, whose answers are not held to the model's.

    Raises:
        ConfigError: without the extra `export`, for another ending, and for int8 of a format that has none.
        DataError: for a source that is missing or damaged.
        GlsimError: when a model has no such graph, saying why.
    """
    out = Path(out)
    kind = format or choose(out.suffix, {".onnx": "onnx", ".pt2": "torch"}, "ending of an exported file")
    if precision == "int8" and kind != "onnx":
        raise ConfigError(f"precision=int8 is for ONNX; name an --out that ends in .onnx, not {out}")
    model = load(source)
    if isinstance(model, GraphModel):
        raise ConfigError(f"{source} is exported already; export the bundle it was made from")
    make_parent(out)
    tolerance = {"float32": TOLERANCE, "int8": None}[precision]
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        file = Path(folder) / out.name
        exported = FORMATS[kind](model, file, precision)
        checks = [compare(model, exported, count) for count in BATCHES]
        failed = any(not c.difference <= (TOLERANCE if tolerance else float("inf")) for c in checks)
        files = sorted(Path(folder).iterdir(), key=lambda path: path == file)  # what it refers to goes first
        size = sum(path.stat().st_size for path in files)
        if not failed:
            for path in files:
                path.replace(out.with_name(path.name))
    return ExportedModel(
        out=str(out),
        files=[] if failed else [str(out.with_name(path.name)) for path in files],
        bytes=size,
        format=kind,
        precision=precision,
        tolerance=tolerance,
        checks=checks,
        exit_code=4 if failed else 0,
    )


@torch.inference_mode()
def compare(model: Model, exported: Callable[[Tensor], Output], count: int) -> BatchCheck:
    """What a model and its export say of the same random images.

    Args:
        model: in eval mode.
        exported: the same as a graph.
        count: images.
    """
    draw = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, *model.config.image_size, generator=draw)
    mine, theirs = model(images), exported(images)
    boxes = None
    if mine.selection is not None and theirs.selection is not None:
        boxes = int((mine.selection.boxes == theirs.selection.boxes).all(dim=1).sum())
    return BatchCheck(
        batch=count,
        difference=float((mine.logits - theirs.logits).abs().max()),
        same_answers=int((mine.logits.argmax(dim=1) == theirs.logits.argmax(dim=1)).sum()),
        same_boxes=boxes,
    )


def write_onnx(model: Model, path: Path, precision: str) -> Callable[[Tensor], Output]:
    """Write `path` and the graphs that follow the first, `NAME.2.onnx`, ..; returns what ONNX Runtime makes of them."""
    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if lacking:
        raise ConfigError(f"ONNX needs {', '.join(lacking)}: pip install 'glsim[export]'")
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if precision == "int8" and size > LARGEST_FILE:
        raise ConfigError(f"precision=int8: {size:,} bytes of weights, more than one ONNX file holds; use float32")
    graphs = make_graphs(model)
    paths = [path, *(path.with_name(f"{path.stem}.{i}{path.suffix}") for i in range(2, len(graphs) + 1))]
    for graph, file in zip(graphs, paths, strict=True):
        program: Any = torch_onnx(graph)
        program.save(file, external_data=size > LARGEST_FILE)
        if precision == "int8":
            quantise(file)
    config = {**model.config.as_dict(), "preprocessing": preprocessing_of(model).as_dict()}
    config |= {"graphs": [file.name for file in paths[1:]], "weights": digest(model.state_dict())}
    for file in paths:
        describe(file, config if file == path else {"weights": config["weights"]})
    return open_graph(path)


def torch_onnx(graph: Graph) -> Any:
    """The graph by torch's exporter, any number of images at a time; GlsimError says what it cannot translate."""
    rest = torch.export.Dim.DYNAMIC  # as long as the first input
    shapes = [{0: torch.export.Dim("batch")}, *[{0: rest}] * (len(graph.inputs) - 1)]
    try:
        with quiet(), torch.no_grad():
            return torch.onnx.export(
                graph.module.eval(),
                tuple(graph.inputs.values()),
                dynamo=True,
                dynamic_shapes=tuple(shapes),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise GlsimError(f"torch cannot write this model as ONNX: {reason(error)}") from error


def stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """`torch.sort(x, stable=True)` as ONNX: of equal values TopK takes the one with the lower index first."""
    from onnxscript import opset18

    op: Any = opset18
    length = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, length, axis=dim, largest=int(descending))


def reason(error: BaseException) -> str:
    """What an exporter stumbled over in the end, without its advice: the first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)


def quantise(path: Path) -> None:
    """Weights of the matrix products as 8-bit integers, their inputs scaled to 8 bits as they come."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Weights that both passes share come through a Transpose; folded, they are constants that can be quantised.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(path)
    del graph.graph.value_info[:]  # shapes of before the folding
    with quiet():
        quantize_dynamic(
            graph, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        )


def describe(path: Path, config: dict[str, Any]) -> None:
    """Put `config` into the metadata of an ONNX file, a JSON value for each key; weights beside it stay there."""
    import onnx

    graph = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in config.items()})
    onnx.save(graph, path)


def write_torch(model: Model, path: Path, precision: str) -> Callable[[Tensor], Output]:
    """Write `path` as a program of torch.export, `config.json` inside; returns it as it was read back."""
    graphs = make_graphs(model)
    if len(graphs) > 1:
        raise ConfigError("a model that may answer after its first pass is two graphs; export it as ONNX")
    (graph,) = graphs
    config = {**model.config.as_dict(), "preprocessing": preprocessing_of(model).as_dict(), "outputs": graph.outputs}
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(graph.module.eval(), tuple(graph.inputs.values()), dynamic_shapes=({0: batch},))
    torch.export.save(program, path, extra_files={"config.json": json.dumps(config)})
    module = torch.export.load(path).module()

    return lambda images: as_output(*module(images))


FORMATS: dict[str, Callable[[Model, Path, str], Callable[[Tensor], Output]]] = {
    "onnx": write_onnx,
    "torch": write_torch,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the exporters keep their notes on single operators to themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
