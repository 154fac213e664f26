"""`glsim convert`: a bundle from a checkpoint of the authors of GLSim, TransFG or FFVT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from glsim.cli.options import MISSING, Settings, dataclass, positional, setting

if TYPE_CHECKING:
    from glsim.checkpoints.convert import ConvertedCheckpoint

PURPOSE = "Share"


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Turn a checkpoint of the GLSim, TransFG or FFVT authors into a bundle, reporting every key used or ignored."""

    checkpoint: str = positional(MISSING, "official .pth file", path="reads")
    bundle: str = positional(MISSING, "folder to make", path="folder")
    method: Literal["glsim", "transfg", "ffvt"] = setting("glsim", "whose checkpoint it is")
    options: dict[str, Any] = setting({}, "what the file does not hold, as --options.num_heads 12 --options.stride 12")
    labels: str | None = setting(None, "text file with one class name a line, in the order of the logits", path="reads")


def run(options: Options, progress: bool) -> ConvertedCheckpoint:
    """Convert it."""
    from glsim.checkpoints.convert import convert_checkpoint

    return convert_checkpoint(**vars(options))


def show(r: ConvertedCheckpoint, options: Options) -> str:
    """What became of every key."""
    lines = [f"{len(r.used)} keys used, {len(r.ignored)} ignored, {len(r.missing)} missing"]
    lines += [f"  used     {published} -> {ours}" for published, ours in r.used.items()]
    lines += [f"  ignored  {key}: {why}" for key, why in r.ignored.items()]
    lines += [f"  missing  {key}" for key in r.missing]
    return "\n".join([*lines, f"options: {r.options}", f"bundle: {r.bundle}"])
