"""`glsim flops`: operations and parameters of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glsim.cli.options import PlannedModel, setting
from glsim.models import METHODS

if TYPE_CHECKING:
    from glsim.evaluation.flops import FlopsComparison

PURPOSE = "Measure"
CALL = "glsim.evaluation.flops:compare_flops"


class Options(PlannedModel):
    """Count parameters and floating point operations of a model; nothing is timed."""

    method: str = setting("glsim", f"shown beside plain; one of: {', '.join(METHODS)}", choices=METHODS)
    num_classes: int = setting(200, "outputs of the last layer", least=1)
    options: dict[str, Any] = setting({}, "options of the method, as --options.crop_size 112")


def show(r: FlopsComparison, options: Options) -> str:
    """The rows as a table under a head that says how it counts."""
    first = r.rows[0]
    lines = [
        "Operations of one answer, 2 per multiply-add, fused attention off.",
        f"{first.backbone}, {' x '.join(map(str, first.image_size))} pixels",
        "",
        f"{'':8} {'parameters':>12} {'GFLOPs':>10} {'x plain':>8}",
    ]
    lines += [f"{x.method:8} {x.parameters / 1e6:10.2f} M {x.gflops:10.2f} {x.ratio:8.3f}" for x in r.rows]
    return "\n".join(lines)
