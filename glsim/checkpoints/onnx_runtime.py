"""ONNX graphs in ONNX Runtime, which answer like the model they were exported from."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from glsim.checkpoints.config import check_config
from glsim.files import one_line, open_regular, parse_json, printable, shorten
from glsim.models.base import Model
from glsim.models.config import ModelConfig
from glsim.types import ConfigError, DataError, Output, Selection

IMAGES, LOGITS, BOXES, GIVEN, UNSURE = "images", "logits", "boxes", "given", "unsure"  # inputs and outputs


class GraphModel(Model):
    """A model without weights of its own: `model(images)` asks ONNX Runtime. It answers; it has no tokens to look at.

    Of several graphs, each one sees the images of which the one before is `unsure` (B,), and its outputs replace theirs
    there. Its inputs are outputs of the graphs before it, or the images, by name.
    """

    def __init__(self, sessions: list[Any], config: ModelConfig, path: Path) -> None:
        super().__init__()
        self.sessions, self.config, self.path = sessions, config, path

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised. The selection holds the boxes alone: scores and indices are empty.

        Of several graphs, `needs_second_pass` tells which images were unsure after the first one.
        """
        values: dict[str, np.ndarray] = {IMAGES: images.detach().float().cpu().numpy()}
        rows = np.ones(len(images), dtype=bool)
        for session in self.sessions:
            asked = {value.name: values[value.name] for value in session.get_inputs()}
            wanted = asked if rows.all() else {name: value[rows] for name, value in asked.items()}
            names = [value.name for value in session.get_outputs()]
            for name, part in zip(names, _run(session, names, wanted, self.path), strict=True):
                values.setdefault(name, np.zeros((len(images), *part.shape[1:]), part.dtype))[rows] = part
            rows = rows & values.get(UNSURE, False)
            if not rows.any():
                break
        found = {name: torch.from_numpy(value).to(images.device) for name, value in values.items()}
        return as_output(found[LOGITS], found.get(BOXES))._replace(needs_second_pass=found.get(UNSURE))

    def _lacks(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(f"{self.path} is an exported graph: it only answers; use the bundle it was exported from")

    features = state_dict = parameters = _lacks
    backbone = property(_lacks)


def as_output(logits: Tensor, boxes: Tensor | None = None) -> Output:
    """What a graph says, (B, C) and (B, 4), as what a model says; of the selection only the boxes are known."""
    if boxes is None:
        return Output(logits)
    return Output(logits, Selection(logits[:, :0], boxes[:, :0], boxes, (0, 0)))


def open_graph(path: Path) -> GraphModel:
    """The graph `path` and those that follow it, in eval mode; `config` is what its metadata says.

    Raises ConfigError without ONNX Runtime and DataError for a file that is no graph, damaged, not one of ours, or does
    not answer as its metadata says: it is asked once, for two images.
    """
    sessions = [_session(path)]
    metadata = sessions[0].get_modelmeta().custom_metadata_map
    try:
        config = {key: parse_json(value, None) for key, value in metadata.items()}
    except ValueError as error:
        raise DataError(f"{path} was not exported by glsim: its metadata cannot be read: {one_line(error)}") from error
    following = config.pop("graphs", [])
    if not (isinstance(following, list) and all(isinstance(name, str) for name in following)):
        raise DataError(f"{path} is damaged: graphs={printable(shorten(following, 80))}; a list of names is needed")
    if any(name != Path(name).name or name in ("", "..", path.name) for name in following) or len(following) > 1:
        raise DataError(
            f"{path} was refused: one graph may follow it, of a name of its own and beside it, not "
            f"{printable(shorten(following, 80))}"
        )
    for name in following:
        sessions.append(_session(path.with_name(name)))
        other = sessions[-1].get_modelmeta().custom_metadata_map.get("weights")
        if other != metadata.get("weights"):
            raise DataError(f"{path.with_name(name)} was exported from another model than {path}; export it again")
    return GraphModel(sessions, check_graphs(sessions, config, path), path).eval()


def check_graphs(sessions: list[Any], said: dict[str, Any], path: Path) -> ModelConfig:
    """The config of graphs, which their metadata `said`, checked.

    Raises DataError unless inputs and outputs have the names, types and shapes that `export` gives them for it. They
    are declared, and they are what two images get: a declaration may lie.
    """
    known = {IMAGES}
    for session in sessions:
        asked, told = ({value.name for value in values} for values in (session.get_inputs(), session.get_outputs()))
        if not asked <= known or not told <= {LOGITS, BOXES, GIVEN, UNSURE} or LOGITS not in told:
            raise DataError(
                f"{path} was not exported by glsim: its inputs are {_names(asked)}, its outputs are {_names(told)}"
            )
        known |= told
    config = check_config(said, path)
    height, width = config.image_size
    kinds: dict[str, tuple[str, type, tuple[int | None, ...]]] = {  # None: any, for the batch or as the graph has it
        IMAGES: ("tensor(float)", np.float32, (None, 3, height, width)),
        LOGITS: ("tensor(float)", np.float32, (None, config.num_classes)),
        BOXES: ("tensor(int64)", np.int64, (None, 4)),
        GIVEN: ("tensor(float)", np.float32, (None, None)),
        UNSURE: ("tensor(bool)", np.bool_, (None,)),
    }
    for value in (value for session in sessions for value in (*session.get_inputs(), *session.get_outputs())):
        kind, _, shape = kinds[value.name]
        declared = [side if isinstance(side, int) else None for side in value.shape]
        if value.type != kind or not _fits(declared, shape) or declared[0] is not None:
            raise DataError(
                f"{path} does not fit its metadata: {value.name} is {value.type} {_shape(value.shape)}; {kind} "
                f"{_shape(shape)} is needed, for any number of images"
            )
    values: dict[str, Any] = {IMAGES: np.zeros((2, 3, height, width), np.float32)}
    for session in sessions:
        names = [value.name for value in session.get_outputs()]
        inputs = {value.name: values[value.name] for value in session.get_inputs()}
        for name, found in zip(names, _run(session, names, inputs, path), strict=True):
            _, dtype, shape = kinds[name]
            wanted = (2, *shape[1:])
            if not isinstance(found, np.ndarray) or found.dtype != dtype or not _fits(found.shape, wanted):
                raise DataError(
                    f"{path} does not fit its metadata: for two images it gives {name} of {_shape(np.shape(found))}; "
                    f"{_shape(wanted)} is needed"
                )
            if dtype == np.float32 and not np.isfinite(found).all():
                raise DataError(f"{path} was refused: {name} of a blank image are no numbers; export the bundle again")
            values[name] = found
    return config


def _fits(shape: Sequence[int | None], wanted: Sequence[int | None]) -> bool:
    """Whether both have as many sides, and the same where neither is None."""
    return len(shape) == len(wanted) and all(a == b for a, b in zip(shape, wanted, strict=True) if None not in (a, b))


def _names(names: set[str]) -> str:
    return printable(shorten(", ".join(sorted(names)) or "none", 200))


def _shape(sides: Any) -> str:
    return "(" + ", ".join(printable(shorten(side, 40)) if side is not None else "any" for side in sides) + ")"


def _run(session: Any, names: list[str], inputs: dict[str, np.ndarray], path: Path) -> list[Any]:
    """The outputs `names` of a session; DataError for whatever fails inside of ONNX Runtime."""
    try:
        return session.run(names, inputs)
    except Exception as error:  # ONNX Runtime's exceptions have no class in common but this one
        raise DataError(f"{path} fails in ONNX Runtime: {one_line(error)}") from error


def _session(path: Path) -> Any:
    """A file in ONNX Runtime, on as many threads as torch has."""
    try:
        runtime: Any = import_module("onnxruntime")
    except ImportError as error:
        raise ConfigError(f"{path} needs ONNX Runtime ({error}): pip install 'glsim[export]'") from error
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4  # errors are raised
    try:
        open_regular(path).close()  # ONNX Runtime would wait for a FIFO
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as `_run`
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error
