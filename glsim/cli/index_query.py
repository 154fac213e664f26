"""`glsim index query`: the classes of images, by an index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.options import BoxLoading, Images, Lines, SkipBad, positional, setting, show_skipped
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.inference.index import IndexAnswers

PURPOSE = "Answer"
CALL = "glsim.inference.index:query_index"


class Options(SkipBad, BoxLoading, Images):
    """Name what is in images by an index: classes by similarity, nearest images and their vote."""

    index: str = positional("folder of glsim index build", path="reads")
    top_k: int = setting(5, "classes per image", least=1)
    neighbours: int = setting(5, "nearest images that vote, and are shown", least=1)
    below: float = setting(-1.0, "similarity of the best class below which an image is unknown")
    source: str | None = setting(None, "the model, where it is no longer where it was", path="reads")

    def check(self) -> None:
        """A similarity is a cosine."""
        super().check()
        if not -1 <= self.below <= 1:
            raise ConfigError(f"below={self.below}: a cosine, from -1 to 1")


def show(r: IndexAnswers, options: Options) -> Lines:
    """An image's answer, the classes by similarity, and what the neighbours and the head say."""
    for a in r.answers:
        yield f"{a.path}: {a.label or 'unknown'} ({', '.join(f'{c.label} {c.similarity:.3f}' for c in a.classes)})"
        yield f"  neighbours: {a.vote.label} {a.vote.share:.0%}   head: {a.head.label} {a.head.probability:.1%}"
        yield from (f"    {n.similarity:.3f}  {n.label}  {n.path}" for n in a.neighbours)
    yield from show_skipped(r.skipped)
