"""The model card of a bundle: `README.md`, as the Hugging Face Hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from glsim.checkpoints.config import MEASURED
from glsim.data.transforms import Preprocessing
from glsim.files import code_span, markdown, printable, shown, to_json
from glsim.models.config import ModelConfig

UNKNOWN = "unknown"  # a licence that nobody told


def model_card(config: ModelConfig, metrics: Mapping[str, Any] | None) -> str:
    """The model card: what it is, what it learned from, how well it did, how to use it, under whose licences."""
    config, metrics = shown(config), shown(metrics)  # a card is for people
    labels, licence, training, data = config.label_names or [], config.licence, config.training, config.data
    p = Preprocessing.from_dict(config.preprocessing or {})
    measured = {k: v for k, v in (metrics or {}).items() if isinstance(v, dict) and set(MEASURED) <= set(v)}
    title = f"{config.method} on {config.backbone}"
    results = [
        EvalResult("image-classification", data["source"], data["source"], "accuracy", v["top1"], dataset_split=k)
        for k, v in measured.items()
        if "source" in data
    ]
    start = training.get("start", "")
    head = ModelCardData(
        license=licence.get("model"),
        library_name="glsim",
        pipeline_tag="image-classification",
        tags=["glsim", "fine-grained", "image-classification"],
        base_model=start if start.startswith("timm/") else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    named = ", ".join(map(markdown, list(labels)[:20])) + (f", .. ({len(labels)} in all)" if len(labels) > 20 else "")
    size, resize = (" x ".join(map(str, side)) for side in (p.image_size, p.resize))
    lines = [
        f"# {markdown(title)}",
        "",
        f"Tells {config.num_classes} classes apart in images of {size} pixels" + (f": {named}." if named else "."),
        "It knows no others: an image of anything else is given one of these names too.",
        "",
        f"- Method: {code_span(config.method)}, options {code_span(to_json(config.options))}",
        f"- Backbone: {code_span(config.backbone)} (timm), arguments {code_span(to_json(config.backbone_args))}",
        f"- Images: resized to {resize} ({p.resize_rule}), the centre {size}; mean {list(p.mean)}, std {list(p.std)}",
    ]
    if {"source", "counts", "split_hash"} <= set(data):
        counts = ", ".join(f"{count} {markdown(split)}" for split, count in data["counts"].items())
        source, drawn = code_span(data["source"]), code_span(data["split_hash"][:16])
        lines.append(f"- Data: {source}, {counts} images, split hash {drawn}")
    if {"start", "epochs", "optimizer", "lr", "batch_size", "seed"} <= set(training):
        lines.append(
            f"- Training: from {markdown(start)}; {training['epochs']} epochs of {markdown(training['optimizer'])}, "
            f"learning rate {training['lr']}, {training['batch_size']} images a step, seed {training['seed']}"
        )
    calibration = config.calibration
    if {"count", "data"} <= set(calibration):
        lines.append(f"- Calibrated on {calibration['count']} images of {code_span(calibration['data'])}")
        if calibration.get("threshold") is not None and "coverage" in calibration:
            lines[-1] += f"; `--reject` answers {calibration['coverage']:.0%} of them, the confident ones"
        if calibration.get("threshold") is not None and {"answered", "answered_correct"} <= set(calibration):
            wrong = calibration["answered"] - calibration["answered_correct"]
            lines[-1] += f" ({calibration['answered']} answers, {wrong} of them wrong)"
    for split, result in measured.items():
        lines.append(
            f"- {markdown(split)}: top-1 {result['top1']:.2%} ({result['correct']} of {result['count']}), top-5 "
            f"{result['top5']:.2%}, mean over classes {result['per_class_mean']:.2%}"
        )
    parts = {"model": "these weights", "backbone": "the weights it started from", "data": "the images"}
    lines.append(
        "- Licence: " + "; ".join(f"of {what}: {markdown(licence.get(k, UNKNOWN))}" for k, what in parts.items())
    )
    lines += ["", "```python", "import glsim", 'for answer in glsim.Predictor("PATH_TO_THIS_FOLDER")(["image.jpg"]):']
    lines += ["    print(answer.labels[0], answer.probabilities[0])", "```", ""]
    return "\n".join(["---", head.to_yaml(), "---", *map(printable, lines)])  # a label may hold line ends
