"""`glsim bench`: time and memory of models, measured in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.evaluation.speed_settings import SpeedSettings as Options

if TYPE_CHECKING:
    from glsim.evaluation.speed import SpeedComparison, SpeedRow

PURPOSE = "Measure"
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


def run(options: Options, progress: bool) -> SpeedComparison:
    """Measure them."""
    from glsim.evaluation.speed import compare_speed

    return compare_speed(options, progress)


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
