"""Weights of another model, or of the ViT authors' files, as the start of training."""

from __future__ import annotations

import zipfile
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from glsim.checkpoints.bundle import load
from glsim.checkpoints.config import check_finite
from glsim.checkpoints.official import OFFICIAL
from glsim.files import one_line, open_regular
from glsim.models import resample_positions
from glsim.models.base import Model
from glsim.types import ConfigError, DataError, GlsimError


def init_from(model: Model, source: str | Path) -> list[str]:
    """Give a model the weights of another one wherever name and shape agree.

    Args:
        model: changed in place; positions are resampled to its grid.
        source: anything `load` takes, or a `.npz` file of the ViT authors (ImageNet-21k: where the field starts from),
            which timm reads.

    Returns:
        The names of the weights that stay as they were.

    Raises:
        ConfigError: when not even the backbones agree.
        DataError: for a file that cannot be read.
    """
    if Path(source).suffix == ".npz":
        return _init_from_npz(model, Path(source))
    method = model.config.method
    published = {"method": method} if str(source).endswith((".pth", ".pt", ".bin")) and method in OFFICIAL else {}
    other = resample_positions(load(source, **published).state_dict(), model.backbone.net)
    own = model.state_dict()
    taken = {k: v for k, v in other.items() if k in own and own[k].shape == v.shape}
    kept = sorted(set(own) - set(taken))
    lacking = [k for k in kept if k.startswith("backbone.")]
    if lacking:
        raise ConfigError(f"{source} has another backbone than {model.config.backbone!r}: nothing for {lacking[0]}")
    model.load_state_dict(taken, strict=False)
    model.initialised(kept)
    return kept


def _init_from_npz(model: Model, path: Path) -> list[str]:
    net = model.backbone.net
    if not isinstance(net, VisionTransformer):
        raise ConfigError(f"{path}: .npz files hold the weights of a ViT, {model.config.backbone!r} is none")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    try:
        open_regular(path).close()  # numpy would wait for a FIFO
        net.load_pretrained(str(path))
        check_finite(net.state_dict(), path)
    except GlsimError:
        net.load_state_dict(before)
        raise
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        net.load_state_dict(before)
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error
    except (RuntimeError, AssertionError, IndexError, TypeError) as error:
        net.load_state_dict(before)
        raise ConfigError(f"{path} does not fit {model.config.backbone!r}: {one_line(error)}") from error
    kept = sorted(k for k in model.state_dict() if not k.startswith("backbone."))
    model.initialised(kept)
    return kept
