"""`glsim export`: a model as one ONNX graph or torch.export program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glsim.cli.options import Lines, Settings, positional, required, setting
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.checkpoints.export import ExportedModel

PURPOSE = "Share"
CALL = "glsim.checkpoints.export:export_model"


class Options(Settings):
    """Write a model as one graph that runs without glsim (ONNX, torch.export), and hold it to the model's answers."""

    source: str = positional("bundle, hf-hub:owner/name or official .pth", path="reads")
    out: str = required("file to write: model.onnx, or model.pt2 for torch.export", path="file")
    format: Literal["onnx", "torch"] | None = setting(None, "default: by the ending of --out")
    precision: Literal["float32", "int8"] = setting(
        "float32", "int8: ONNX with weights of 8 bits, smaller and faster on CPUs; its answers are no longer the same"
    )

    def check(self) -> None:
        """The format follows from the ending of `out`; only ONNX has int8."""
        super().check()
        named = {".onnx": "onnx", ".pt2": "torch"}.get(Path(self.out).suffix)
        if named is None or self.format not in (None, named):
            raise ConfigError(f"out={self.out}: name a file that ends in .onnx (format onnx) or .pt2 (format torch)")
        self.fill(format=named)
        if self.precision == "int8" and named != "onnx":
            raise ConfigError(f"precision=int8 is for ONNX; name an --out that ends in .onnx, not {self.out}")


def show(r: ExportedModel, options: Options) -> Lines:
    """How near the export is to the model at every batch size, and where it is."""
    for c in r.checks:
        boxes = "" if c.same_boxes is None else f", same box {c.same_boxes} of {c.batch}"
        answers = f"same answer {c.same_answers} of {c.batch}"
        yield f"batch {c.batch}: logits differ by at most {c.difference:.1e}, {answers}{boxes}"
    if r.exit_code:
        yield f"more than {r.tolerance}: nothing was written to {r.out}"
    else:
        yield f"written: {', '.join(r.files)} ({r.bytes / 2**20:.1f} MiB, {r.precision})"
