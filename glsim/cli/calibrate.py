"""`glsim calibrate`: confidences, early exit and rejection of a bundle, fitted on one split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from glsim.cli.eval import show_answered
from glsim.cli.options import MISSING, DataSplit, Loading, dataclass, positional, setting
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.evaluation.calibration import Calibration

PURPOSE = "Measure"


@dataclass(frozen=True, kw_only=True)
class Options(Loading, DataSplit):
    """Fit confidences on validation images, and when a first pass may answer alone; changes the bundle."""

    source: str = positional(MISSING, "bundle folder", path="folder")
    split: Literal["train", "val", "test", "all"] = setting(
        "val", "which images, as eval takes them; none that the model was trained on; all: every one there is"
    )
    max_loss: float = setting(
        0.1, "points of accuracy (of 100) that skipping second passes may cost on these images", least=0
    )
    max_error: float | None = setting(
        None, "points (of 100) of the answers that may be wrong: below the threshold found, --reject says unknown"
    )

    def check(self) -> None:
        """Points of 100."""
        super().check()
        if self.max_error is not None and not 0 <= self.max_error < 100:
            raise ConfigError(f"max_error={self.max_error}: points of 100, from 0 to below 100")


def run(options: Options, progress: bool) -> Calibration:
    """Fit them, and write them into the bundle."""
    from glsim.evaluation.calibration import calibrate_bundle

    return calibrate_bundle(**vars(options), progress=progress)


def show(r: Calibration, options: Options) -> str:
    """What the fit changed."""
    lines = [f"{r.count} images of {r.split}: temperature {r.temperature:.3f}"]
    if r.temperature_interval is None:
        lines[0] += f", kept at 1: {r.temperature_kept}; calibrate on more images"
    else:
        low, high = r.temperature_interval
        lines[0] += f" ({low:.3f} to {high:.3f}, 95 %)"
    lines.append(
        f"expected calibration error {r.ece[0]:.2%} -> {r.ece[1]:.2%}, mean log-loss {r.nll[0]:.4f} -> {r.nll[1]:.4f}"
    )
    if r.correct_first is not None and r.correct_second is not None:
        lines += [
            f"first pass alone {r.correct_first / r.count:.2%} ({r.correct_first}), "
            f"always both {r.correct_second / r.count:.2%} ({r.correct_second}), "
            f"as calibrated {r.correct / r.count:.2%} ({r.correct})",
            f"second pass for {r.second_pass_share:.1%} of the images, margin {r.margin}",
        ]
    if r.threshold is not None:
        assert r.coverage is not None and r.answered is not None and r.answered_correct is not None
        lines.append(show_answered(r.threshold, r.coverage, r.answered, r.answered_correct))
        lines.append(f"that rests on {r.count} images: up to {r.error_at_most:.1%} of such answers may be wrong (95 %)")
    elif r.max_error is not None:
        lines.append(f"no threshold keeps the error at {r.max_error:g} points: --reject will not work")
    return "\n".join([*lines, f"written: {r.bundle}"])
