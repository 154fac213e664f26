"""Upload of a bundle to the Hugging Face Hub, with its licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glsim.checkpoints.bundle import CARD, CONFIG, METRICS_FILE, WEIGHTS, load_bundle, read_config
from glsim.checkpoints.card import UNKNOWN, model_card
from glsim.checkpoints.config import read_metrics
from glsim.checkpoints.hub import push
from glsim.config import Push
from glsim.files import to_json
from glsim.types import ConfigError, DataError


def run(s: Push) -> dict[str, Any]:
    """The verb: send weights, config, metrics and a card that names the licence; {"repository", "commit", "licence"}.

    The bundle is loaded first: what cannot be loaded is not sent. Raises ConfigError without a licence or a token.
    """
    folder = Path(s.run)
    if not folder.is_dir():
        raise DataError(f"{folder} is no bundle folder; make one with glsim train or glsim convert")
    load_bundle(folder)
    config = read_config(folder)
    licence = {"data": UNKNOWN, "backbone": UNKNOWN, **config.get("licence", {})}
    given = {"model": s.licence, "data": s.data_licence, "backbone": s.backbone_licence}
    licence |= {name: value for name, value in given.items() if value is not None}
    if licence.get("model", UNKNOWN) == UNKNOWN:
        raise ConfigError(
            f"{folder} does not say under which licence its weights may be used; give one: --licence apache-2.0 "
            f"(of the weights it started from: {licence['backbone']}; of the images: {licence['data']})"
        )
    config["licence"] = licence
    config["pretrained_cfg"] = {**config.get("pretrained_cfg", {}), "license": licence["model"]}
    file = folder / METRICS_FILE
    metrics = read_metrics(file)
    files: dict[str, str | Path] = {
        WEIGHTS: folder / WEIGHTS,
        CONFIG: to_json(config, indent=2) + "\n",
        CARD: model_card(config, metrics),
    }
    if metrics is not None:
        files[METRICS_FILE] = file
    message = f"{config['method']} on {config['backbone']}, by glsim push"
    commit = push(files, s.repository, message, s.private or None)
    return {"repository": s.repository, "commit": commit, "licence": licence}
