"""`glsim calibrate`: confidences, early exit and rejection of a bundle, fitted on one split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from glsim.cli.eval import show_answered
from glsim.cli.options import BoxLoading, DataSplit, Lines, positional, setting
from glsim.types import ConfigError

if TYPE_CHECKING:
    from glsim.evaluation.calibration import Calibration

PURPOSE = "Measure"
CALL = "glsim.evaluation.calibration:calibrate_bundle"


class Options(BoxLoading, DataSplit):
    """Fit confidences on validation images, and when a first pass may answer alone; changes the bundle."""

    source: str = positional("bundle folder", path="folder")
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


def show(r: Calibration, options: Options) -> Lines:
    """What the fit changed."""
    how = f", kept at 1: {r.temperature_kept}; calibrate on more images"
    if r.temperature_interval is not None:
        how = " ({:.3f} to {:.3f}, 95 %)".format(*r.temperature_interval)
    yield f"{r.count} images of {r.split}: temperature {r.temperature:.3f}{how}"
    (ece, ece_after), (nll, nll_after) = r.ece, r.nll
    yield f"expected calibration error {ece:.2%} -> {ece_after:.2%}, mean log-loss {nll:.4f} -> {nll_after:.4f}"
    if r.correct_first is not None and r.correct_second is not None:
        rights = {"first pass alone": r.correct_first, "always both": r.correct_second, "as calibrated": r.correct}
        yield ", ".join(f"{name} {right / r.count:.2%} ({right})" for name, right in rights.items())
        yield f"second pass for {r.second_pass_share:.1%} of the images, margin {r.margin}"
    if r.threshold is not None:
        assert r.coverage is not None and r.answered is not None and r.answered_correct is not None
        yield show_answered(r.threshold, r.coverage, r.answered, r.answered_correct)
        yield f"that rests on {r.count} images: up to {r.error_at_most:.1%} of such answers may be wrong (95 %)"
    elif r.max_error is not None:
        yield f"no threshold keeps the error at {r.max_error:g} points: --reject will not work"
    yield f"written: {r.bundle}"
