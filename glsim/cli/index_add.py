"""`glsim index add`: more images for an index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.index_build import show_size
from glsim.cli.options import MISSING, Images, Loading, SkipBad, dataclass, positional, setting, show_skipped
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.inference.index import IndexAddition

PURPOSE = "Answer"


@dataclass(frozen=True, kw_only=True)
class Options(SkipBad, Loading, Images):
    """Add images to an index, of a new class or a known one; the class is recognised at once."""

    index: str = positional(MISSING, "folder of glsim index build", path="folder")
    label: str | None = setting(None, "class of all these images; default: of each, the name of its folder")
    source: str | None = setting(None, "the model, where it is no longer where it was", path="reads")

    def check(self) -> None:
        """A class has a name."""
        super().check()
        if self.label is not None and not self.label.strip():
            raise ConfigError("label='': give the class a name")


def run(options: Options, progress: bool) -> IndexAddition:
    """Add them."""
    from glsim.inference.index import add_to_index

    return add_to_index(**vars(options), progress=progress)


def show(r: IndexAddition, options: Options) -> str:
    """What the index holds now, and what was added."""
    lines = [show_size(r), f"added {r.added} images"]
    if r.there_before:
        lines[-1] += f" ({r.there_before} were there already)"
    for name, count in r.images_of.items():
        new = " (new)" if name in r.new_classes else ""
        lines.append(f"  {name}{new}: {count} images")
    return "\n".join(lines + show_skipped(r.skipped))
