"""`glsim explain layers`: what becomes of the tokens from block to block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.explain import Looked
from glsim.cli.options import show_skipped

if TYPE_CHECKING:
    from glsim.interpret.representations import LayerTrace

PURPOSE = "Explain"
CALL = "glsim.interpret.representations:trace_representations"


class Options(Looked):
    """Measure what becomes of the tokens from block to block (CKA, lengths, distances): layers.png, layers.json."""


def show(r: LayerTrace, options: Options) -> str:
    """Where both files are."""
    lines = [f"layers, over {r.layers.images} images: {r.layers.picture}, {r.layers.table}"]
    return "\n".join([*lines, *show_skipped(r.skipped), f"pictures: {r.out}"])
