"""Measurements of models: accuracy, confidence, localisation, cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glsim.evaluation.calibration import calibrate_bundle
    from glsim.evaluation.evaluate import evaluate_bundle
    from glsim.evaluation.flops import compare_flops
    from glsim.evaluation.localization import evaluate_localization
    from glsim.evaluation.speed import compare_speed

_HOME = {  # of what a notebook asks for; torch is imported when it does
    "calibrate_bundle": "calibration",
    "compare_flops": "flops",
    "compare_speed": "speed",
    "evaluate_bundle": "evaluate",
    "evaluate_localization": "localization",
}

__all__ = ["calibrate_bundle", "compare_flops", "compare_speed", "evaluate_bundle", "evaluate_localization"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'glsim.evaluation' has no attribute {name!r}")
    return getattr(import_module(f"glsim.evaluation.{_HOME[name]}"), name)
