"""`glsim index query`: the classes of images, by an index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.options import MISSING, Images, Loading, SkipBad, dataclass, positional, setting, show_skipped
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.inference.index import IndexAnswers

PURPOSE = "Answer"


@dataclass(frozen=True, kw_only=True)
class Options(SkipBad, Loading, Images):
    """Name what is in images by an index: classes by similarity, nearest images and their vote."""

    index: str = positional(MISSING, "folder of glsim index build", path="reads")
    top_k: int = setting(5, "classes per image", least=1)
    neighbours: int = setting(5, "nearest images that vote, and are shown", least=1)
    below: float = setting(-1.0, "similarity of the best class below which an image is unknown")
    source: str | None = setting(None, "the model, where it is no longer where it was", path="reads")

    def check(self) -> None:
        """A similarity is a cosine."""
        super().check()
        if not -1 <= self.below <= 1:
            raise ConfigError(f"below={self.below}: a cosine, from -1 to 1")


def run(options: Options, progress: bool) -> IndexAnswers:
    """Answer them."""
    from glsim.inference.index import query_index

    return query_index(**vars(options), progress=progress)


def show(r: IndexAnswers, options: Options) -> str:
    """An image's answer, the classes by similarity, and what the neighbours and the head say."""
    lines = []
    for a in r.answers:
        classes = ", ".join(f"{c.label} {c.similarity:.3f}" for c in a.classes)
        lines += [
            f"{a.path}: {a.label or 'unknown'} ({classes})",
            f"  neighbours: {a.vote.label} {a.vote.share:.0%}   head: {a.head.label} {a.head.probability:.1%}",
            *(f"    {n.similarity:.3f}  {n.label}  {n.path}" for n in a.neighbours),
        ]
    return "\n".join(lines + show_skipped(r.skipped))
