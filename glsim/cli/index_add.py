"""`glsim index add`: more images for an index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.index_build import show_size
from glsim.cli.options import BoxLoading, Images, Lines, SkipBad, positional, setting, show_skipped
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.inference.index import IndexAddition

PURPOSE = "Answer"
CALL = "glsim.inference.index:add_to_index"


class Options(SkipBad, BoxLoading, Images):
    """Add images to an index, of a new class or a known one; the class is recognised at once."""

    index: str = positional("folder of glsim index build", path="folder")
    label: str | None = setting(None, "class of all these images; default: of each, the name of its folder")
    source: str | None = setting(None, "the model, where it is no longer where it was", path="reads")

    def check(self) -> None:
        """A class has a name."""
        super().check()
        if self.label is not None and not self.label.strip():
            raise ConfigError("label='': give the class a name")


def show(r: IndexAddition, options: Options) -> Lines:
    """What the index holds now, and what was added."""
    yield show_size(r)
    yield f"added {r.added} images" + (f" ({r.there_before} were there already)" if r.there_before else "")
    for name, count in r.images_of.items():
        yield f"  {name}{' (new)' if name in r.new_classes else ''}: {count} images"
    yield from show_skipped(r.skipped)
