"""Floor 3: exported graphs (ONNX) that answer like the model they were made from, in ONNX Runtime on the CPU."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from glsim.backbone import Model
from glsim.types import ConfigError, DataError, Output, Selection

IMAGES, LOGITS, BOXES, GIVEN, UNSURE = "images", "logits", "boxes", "given", "unsure"  # inputs and outputs


class GraphModel(Model):
    """A model without weights of its own: `model(images)` asks ONNX Runtime. It answers; it has no tokens to look at.

    Of several graphs, each one sees the images of which the one before is `unsure` (B,), and its outputs replace theirs
    there. Its inputs are outputs of the graphs before it, or the images, by name.
    """

    def __init__(self, sessions: list[Any], config: dict[str, Any], path: Path) -> None:
        super().__init__()
        self.sessions, self.config, self.path = sessions, config, path

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised. The selection holds the boxes alone: scores and indices are empty.

        Of several graphs, `aux` tells which images were `unsure` after the first one.
        """
        values: dict[str, np.ndarray] = {IMAGES: images.detach().float().cpu().numpy()}
        rows = np.ones(len(images), dtype=bool)
        for session in self.sessions:
            asked = {value.name: values[value.name] for value in session.get_inputs()}
            wanted = asked if rows.all() else {name: value[rows] for name, value in asked.items()}
            names = [value.name for value in session.get_outputs()]
            for name, part in zip(names, session.run(names, wanted), strict=True):
                values.setdefault(name, np.zeros((len(images), *part.shape[1:]), part.dtype))[rows] = part
            rows = rows & values.get(UNSURE, False)
            if not rows.any():
                break
        found = {name: torch.from_numpy(value).to(images.device) for name, value in values.items()}
        unsure = {UNSURE: found[UNSURE]} if UNSURE in found else {}
        return as_output(found[LOGITS], found.get(BOXES))._replace(aux=unsure)

    def _lacks(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(f"{self.path} is an exported graph: it only answers; use the bundle it was exported from")

    features = state_dict = _lacks
    backbone = property(_lacks)


def as_output(logits: Tensor, boxes: Tensor | None = None) -> Output:
    """What a graph says, (B, C) and (B, 4), as what a model says; of the selection only the boxes are known."""
    if boxes is None:
        return Output(logits)
    return Output(logits, Selection(logits[:, :0], boxes[:, :0], boxes, (0, 0)))


def open_graph(path: Path) -> GraphModel:
    """The graph `path` and those that follow it, in eval mode; `config` is what its metadata says.

    Raises ConfigError without ONNX Runtime and DataError for a file that is no graph, damaged, or not one of ours.
    """
    sessions = [_session(path)]
    try:
        metadata = sessions[0].get_modelmeta().custom_metadata_map
        config = {key: json.loads(value) for key, value in metadata.items()}
        following = config.pop("graphs", [])
        if not all(isinstance(name, str) and name == Path(name).name not in ("", "..") for name in following):
            raise DataError(f"{path} was refused: the graphs that follow it must lie beside it, not in {following}")
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} was not exported by glsim: its metadata cannot be read: {error}") from error
    for name in following:
        sessions.append(_session(path.with_name(name)))
        other = sessions[-1].get_modelmeta().custom_metadata_map.get("weights")
        if other != metadata.get("weights"):
            raise DataError(f"{path.with_name(name)} was exported from another model than {path}; export it again")
    known = {IMAGES}
    for session in sessions:
        asked, known = {value.name for value in session.get_inputs()}, known
        if not asked <= known:
            raise DataError(f"{path} was not exported by glsim: a graph asks for {', '.join(sorted(asked - known))}")
        known = known | {value.name for value in session.get_outputs()}
    if LOGITS not in known:
        raise DataError(f"{path} was not exported by glsim: its outputs are {', '.join(sorted(known - {IMAGES}))}")
    return GraphModel(sessions, config, path).eval()


def _session(path: Path) -> Any:
    """A file in ONNX Runtime, on as many threads as torch has."""
    try:
        runtime: Any = import_module("onnxruntime")
    except ImportError as error:
        raise ConfigError(f"{path} needs ONNX Runtime ({error}): pip install 'glsim[export]'") from error
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3  # errors only
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no class in common but this one
        raise DataError(f"{path} cannot be read: {next(iter(str(error).splitlines()), '')}") from error
