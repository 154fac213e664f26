"""`glsim explain`: pictures of what a model looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glsim.cli.options import Device, Images, SkipBad, Source, positional, required, setting, show_skipped
from glsim.data.box_options import BoxExamples

if TYPE_CHECKING:
    from glsim.interpret.pictures import Pictures

PURPOSE = "Explain"
CALL = "glsim.interpret.pictures:explain_images"


class Looked(BoxExamples, SkipBad, Device, Images, Source):
    """Images that a model is shown, and the folder for what is drawn of it."""

    source: str = positional("bundle, hf-hub:owner/name or official .pth", path="reads")
    out: str = required("folder for the pictures", path="folder")
    options: dict[str, Any] = setting({}, "options of the method to change, as --options.top_o 16")
    limit: int = setting(100, "draw at most this many images", least=1)


class Coloured(Looked):
    """How a map is laid over an image."""

    alpha: float = setting(0.7, "opacity of the heat-map where it is highest, 0 to 1", least=0, most=1)
    power: float = setting(1.0, "exponent on the heat-map in [0, 1]; above 1 leaves the peaks", above=0)


class Options(Coloured):
    """Draw why: heat-map, box and crop as PNG, by one score or several; a sheet of all images beside."""

    metrics: list[str] | None = setting(None, "scores to draw, or all; default: the model's own, gls_cos for plain")
    colormap: str = setting("turbo", "of the heat-map, as matplotlib names them")
    top_only: int = setting(0, "show the scores of only so many best patches (0: all)", least=0)


def show(r: Pictures, options: Options) -> str:
    """A line a picture."""
    lines = [f"{p.path}: {p.label} {p.probability:.1%}, {p.picture}" for p in r.pictures]
    return "\n".join([*lines, *show_skipped(r.skipped), f"pictures: {r.out}"])
