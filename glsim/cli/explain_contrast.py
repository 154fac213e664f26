"""`glsim explain contrast`: pictures of what speaks for one class against another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.explain import Coloured
from glsim.cli.options import required, show_skipped
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.interpret.contrast import ContrastPictures

PURPOSE = "Explain"
CALL = "glsim.interpret.contrast:contrast_images"


class Options(Coloured):
    """Draw what in an image speaks for one class against another, as PNG."""

    classes: list[str] = required("two classes: draw what speaks for the first against the second")

    def check(self) -> None:
        """Two different classes."""
        super().check()
        if len(self.classes) != 2 or self.classes[0] == self.classes[1]:
            raise ConfigError(f"classes: two different classes are needed, got: {' '.join(self.classes)}")


def show(r: ContrastPictures, options: Options) -> str:
    """A line a picture, with the probabilities of both classes."""
    a, b = r.contrast
    lines = [f"{p.path}: {a} {p.probabilities[0]:.1%}, {b} {p.probabilities[1]:.1%}, {p.picture}" for p in r.pictures]
    return "\n".join([*lines, *show_skipped(r.skipped), f"pictures: {r.out}"])
