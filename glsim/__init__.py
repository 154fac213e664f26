"""glsim: fine-grained image recognition. `import glsim` is cheap; torch is imported when a name is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glsim.checkpoints.bundle import load, save
    from glsim.checkpoints.init_from import create_model
    from glsim.inference.predictor import Prediction, Predictor
    from glsim.interpret.contrast import contrast
    from glsim.interpret.heatmaps import explain
    from glsim.models import METHODS
    from glsim.models.scores import METRICS
    from glsim.types import ConfigError, DataError, Features, GlsimError, Output, Selection

__version__ = "0.1.0"

_HOME = {
    "create_model": "glsim.checkpoints.init_from",
    "METHODS": "glsim.models",
    "load": "glsim.checkpoints.bundle",
    "save": "glsim.checkpoints.bundle",
    "METRICS": "glsim.models.scores",
    "Predictor": "glsim.inference.predictor",
    "Prediction": "glsim.inference.predictor",
    "explain": "glsim.interpret.heatmaps",
    "contrast": "glsim.interpret.contrast",
    "Features": "glsim.types",
    "Selection": "glsim.types",
    "Output": "glsim.types",
    "GlsimError": "glsim.types",
    "ConfigError": "glsim.types",
    "DataError": "glsim.types",
}

__all__ = [
    "METHODS",
    "METRICS",
    "ConfigError",
    "DataError",
    "Features",
    "GlsimError",
    "Output",
    "Prediction",
    "Predictor",
    "Selection",
    "contrast",
    "create_model",
    "explain",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'glsim' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
