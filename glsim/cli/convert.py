"""`glsim convert`: a bundle from a checkpoint of the authors of a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glsim.cli.options import Lines, Settings, positional, setting
from glsim.models import METHODS

if TYPE_CHECKING:
    from glsim.checkpoints.convert import ConvertedCheckpoint

PURPOSE = "Share"
CALL = "glsim.checkpoints.convert:convert_checkpoint"


class Options(Settings):
    """Turn a checkpoint of a method's authors into a bundle, reporting every key used or ignored."""

    checkpoint: str = positional("official .pth file", path="reads")
    bundle: str = positional("folder to make", path="folder")
    method: str = setting("glsim", "of which method it is", choices=METHODS)
    options: dict[str, Any] = setting({}, "what the file does not hold, as --options.num_heads 12 --options.stride 12")
    labels: str | None = setting(None, "text file with one class name a line, in the order of the logits", path="reads")


def show(r: ConvertedCheckpoint, options: Options) -> Lines:
    """What became of every key."""
    yield f"{len(r.used)} keys used, {len(r.ignored)} ignored, {len(r.missing)} missing"
    yield from (f"  used     {published} -> {ours}" for published, ours in r.used.items())
    yield from (f"  ignored  {key}: {why}" for key, why in r.ignored.items())
    yield from (f"  missing  {key}" for key in r.missing)
    yield f"options: {r.options}"
    yield f"bundle: {r.bundle}"
