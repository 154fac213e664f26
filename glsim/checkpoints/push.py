"""Upload of a bundle to the Hugging Face Hub, with its licence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from glsim.checkpoints.bundle import CARD, CONFIG, METRICS_FILE, WEIGHTS, load_bundle, read_config
from glsim.checkpoints.card import UNKNOWN, model_card
from glsim.checkpoints.config import read_metrics
from glsim.checkpoints.hub import push
from glsim.files import to_json
from glsim.types import ConfigError, DataError


@dataclass(frozen=True)
class PushedBundle:
    """What `push_bundle` returns."""

    repository: str  # owner/name
    commit: str  # its address
    licence: dict[str, str]  # of the model, the backbone it started from, and the data


def push_bundle(
    run: str | Path,
    repository: str,
    *,
    licence: str | None = None,
    data_licence: str | None = None,
    backbone_licence: str | None = None,
    private: bool = False,
) -> PushedBundle:
    """Send weights, config, metrics and a card that names the licence. What cannot be loaded is not sent.

    Args:
        run: bundle folder; nothing in it is changed.
        repository: owner/name, made where it is not there yet.
        licence: of the weights, by the Hub's name for it; default: what the bundle says.
        data_licence: of the images, likewise.
        backbone_licence: of the weights the training started from, likewise.
        private: make the repository private.

    Raises:
        ConfigError: without a licence or a token.
        DataError: for a folder that is no bundle, or a damaged one.
        GlsimError: when it cannot be sent.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise DataError(f"{folder} is no bundle folder; make one with glsim train or glsim convert")
    load_bundle(folder)
    config = read_config(folder)
    licences = {"data": UNKNOWN, "backbone": UNKNOWN, **config.licence}
    given = {"model": licence, "data": data_licence, "backbone": backbone_licence}
    licences |= {name: value for name, value in given.items() if value is not None}
    if licences.get("model", UNKNOWN) == UNKNOWN:
        raise ConfigError(
            f"{folder} does not say under which licence its weights may be used; give one: --licence apache-2.0 "
            f"(of the weights it started from: {licences['backbone']}; of the images: {licences['data']})"
        )
    named = {**config.pretrained_cfg, "license": licences["model"]}
    config = replace(config, licence=licences, pretrained_cfg=named)
    file = folder / METRICS_FILE
    metrics = read_metrics(file)
    files: dict[str, str | Path] = {
        WEIGHTS: folder / WEIGHTS,
        CONFIG: to_json(config.as_dict(), indent=2) + "\n",
        CARD: model_card(config, metrics),
    }
    if metrics is not None:
        files[METRICS_FILE] = file
    message = f"{config.method} on {config.backbone}, by glsim push"
    return PushedBundle(repository, push(files, repository, message, private or None), licences)
