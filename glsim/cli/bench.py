"""`glsim bench`: time and memory of models, measured in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from glsim.cli.options import Decoding, Device, setting
from glsim.models import METHODS
from glsim.types import ConfigError, choose

if TYPE_CHECKING:
    from glsim.evaluation.speed import SpeedComparison, SpeedRow

PURPOSE = "Measure"
CALL = "glsim.evaluation.speed:compare_speed"
DTYPES = ("float32", "bfloat16", "float16")
LISTS = ("methods", "sources", "backbones", "sizes", "batch_sizes", "dtypes")
SETTINGS = ("method", "backbone", "image_size", "batch_size", "dtype", "compile")  # of a row
RATIOS = ("latency", "training", "memory", "training_memory")
COLUMNS = {  # numbers of a row: head, how one is written
    "accuracy": ("top-1", ".1%"),
    "latency_ms": ("ms", ",.1f"),
    "images_per_second": ("images/s", ",.1f"),
    "loaded_images_per_second": ("loaded/s", ",.1f"),
    "training_ms": ("train ms", ",.1f"),
    "memory_mib": ("MiB", ",.0f"),
    "training_memory_mib": ("train MiB", ",.0f"),
}


class Options(Decoding, Device):
    """Time models in turn: answers, training steps, images a second, peak memory, and their ratios."""

    methods: list[str] = setting(["plain", "glsim"], "what to measure; options after a colon: glsim:crop_size=112")
    sources: list[str] = setting(
        [], "trained bundles or exported .onnx to measure instead, at their own image size", path="reads"
    )
    backbones: list[str] = setting(["vit_base_patch16_224"], "timm model names")
    sizes: list[int] = setting([224], "sides of the images in pixels", least=1)
    batch_sizes: list[int] = setting([1, 8], "images at a time", least=1)
    dtypes: list[str] = setting(["float32"], "float32, bfloat16, float16: of the weights; in training, of autocast")
    compile: Literal["no", "yes", "both"] = setting("no", "compile the models with torch.compile")
    against: str | None = setting(
        None, "a method (or source): divide what the others took by what this one took", path="reads"
    )
    training: bool = setting(True, "time training steps too: forward, backward, SGD")
    memory: bool = setting(True, "measure peak memory too, each row in a process of its own")
    data: str | None = setting(
        None,
        "images (folder or glob): how many a second are read, prepared and answered; with --sources a data set as "
        "for train, whose test images are what is answered (the cost of a model may depend on them)",
        path="reads",
    )
    images: int = setting(128, "with --sources and --data: test images in every turn, in memory beforehand")
    workers: int = setting(2, "processes that load images", least=0)
    repeats: int = setting(10, "rounds in which every model has its turn; median and quartiles are over these", least=1)
    warmup: int = setting(2, "rounds before those, not counted", least=0)
    num_classes: int = setting(200, "outputs of the last layer", least=1)
    backbone_args: dict[str, Any] = setting({}, "handed to timm, as --backbone-args.depth 6")
    out: str | None = setting(None, "folder for bench.json and plots", path="folder")

    def check(self) -> None:
        """Known names, each once, and nothing that sources have of their own."""
        super().check()
        for method in self.methods:
            choose(method.partition(":")[0], METHODS, "method")
        for dtype in self.dtypes:
            choose(dtype, dict.fromkeys(DTYPES), "dtype")
        if self.against is not None:
            choose(self.against, dict.fromkeys(self.sources or self.methods), "method to compare against")
        for name in LISTS:
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}={values}: each only once")
            if not values and name != "sources":
                raise ConfigError(f"{name}={values}: one or more")
        if self.sources:
            usual = Options()
            for name in ("methods", "backbones", "sizes", "num_classes", "backbone_args"):
                if getattr(self, name) != getattr(usual, name):
                    raise ConfigError(f"{name}={getattr(self, name)}: not with --sources, which have their own")
            if self.images < max(self.batch_sizes):
                raise ConfigError(f"images={self.images}: at least the largest of batch_sizes, {max(self.batch_sizes)}")


def show(r: SpeedComparison, options: Options) -> str:
    """The rows as a table: what all share above it, medians with half the distance of the quartiles, ratios."""
    rows, compared = r.rows, r.ratio or []
    varying = [k for k in SETTINGS if k == "method" or len({str(getattr(row, k)) for row in rows}) > 1]
    columns = [k for k in COLUMNS if any(getattr(row, k) is not None for row in rows)]
    parts = [k for k in RATIOS if any(getattr(ratio, k) is not None for ratio in compared)]
    heads = [*varying, *(COLUMNS[k][0] for k in columns), *(f"x {k}" for k in parts)]
    table = [[head.replace("_", " ") for head in heads]]
    for row in rows:
        table.append([str(getattr(row, k)) for k in varying])
        if row.error is None:
            table[-1] += [_cell(row, k) for k in columns]
            ratio = next((x for x in compared if all(getattr(x, k) == getattr(row, k) for k in SETTINGS)), None)
            table[-1] += [_number(getattr(ratio, k, None), ".3f") for k in parts]
    widths = [max(len(line[i]) for line in table if i < len(line)) for i in range(len(heads))]
    failures = ["", *(f"failed: {row.error}" if row.error is not None else "" for row in rows)]
    lines = []
    for line, failure in zip(table, failures, strict=True):
        padded = [cell.ljust(widths[i]) if i < len(varying) else cell.rjust(widths[i]) for i, cell in enumerate(line)]
        lines.append("  ".join([*padded, failure]).rstrip())
    shared = ", ".join(f"{k.replace('_', ' ')} {getattr(rows[0], k)}" for k in SETTINGS if k not in varying)
    head = f"{r.environment['device']}; of a batch: median ± half the distance of the quartiles"
    if compared:
        head += f"; x: divided by {compared[0].against}"
    if options.out is not None:
        lines.append(f"written: {options.out}")
    return "\n".join([head, shared, "", *lines] if shared else [head, "", *lines])


def _number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else ""


def _cell(row: SpeedRow, column: str) -> str:
    text = _number(getattr(row, column), COLUMNS[column][1])
    if text and column.endswith("_ms"):
        low, high = getattr(row, column.replace("_ms", "_quartiles_ms"))
        text += f" ±{(high - low) / 2:,.1f}"
    return text
