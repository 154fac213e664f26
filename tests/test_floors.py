"""The house rule: a module imports from lower floors only."""

import ast
import subprocess
import sys

from conftest import ROOT

FLOORS = [
    {"types", "files"},
    {
        *("attention", "backbone", "selection", "crop", "heads", "losses", "confidence"),
        *("transforms", "images", "stores", "figures", "synthetic", "catalog", "cookbook", "environment", "hub"),
        *("where", "road"),
    },
    {"models", "untrusted"},
    {
        *("config", "adapt", "data", "taxonomy", "sources", "copies", "bundle", "official", "graphs"),
        *("batches", "checkpoint", "cost"),
    },
    {
        *("train", "evaluate", "predict", "pictures", "contrasts", "mistakes", "convert", "datasets", "calibrate"),
        *("reproduce", "report", "benchmark", "loading", "doctor", "doctor_page", "memory"),
        *("service", "serve", "index", "bulk", "export", "push", "localize", "layers"),
    },
    {"quickstart", "cli", "__init__"},
]
SIDEWAYS = {
    ("files", "types"),  # the error of a damaged file
    ("backbone", "attention"),  # an adapter hands out the logits that were collected
    ("crop", "selection"),  # a box is drawn around picked patches
    ("where", "crop"),  # boxes around masks
    ("road", "where"),  # the pixels of a patch
    ("bundle", "official"),  # `load` reads all three formats
    ("bundle", "graphs"),
    ("data", "sources"),  # what is no folder of images
    ("taxonomy", "sources"),  # the same labels
    ("batches", "data"),
    ("taxonomy", "sources"),  # names of classes are compared alike
    ("cost", "config"),  # the settings of its verb
    ("train", "evaluate"),
    ("benchmark", "predict"),  # it times the same answers
    ("evaluate", "predict"),  # the same answer to an image, mirrored or not
    ("calibrate", "evaluate"),  # the same split of the same images
    ("localize", "pictures"),  # the same scores and boxes as are drawn
    ("pictures", "layers"),  # the same verb
    ("evaluate", "mistakes"),  # the page of what it counted
    ("mistakes", "pictures"),
    ("contrasts", "pictures"),  # drawn on the same pages
    ("figures", "confidence"),
    ("mistakes", "predict"),
    ("service", "predict"),  # the same answer, asked by many
    ("service", "pictures"),
    ("serve", "service"),
    ("serve", "pictures"),
    ("images", "stores"),  # a file by its URI
    ("bulk", "predict"),
    ("index", "evaluate"),  # the same split of the same images
    ("index", "predict"),  # images read and answered, batch by batch
    ("reproduce", "train"),
    ("reproduce", "evaluate"),
    ("report", "train"),  # reads what it left in the folder of a run
    ("report", "reproduce"),
    ("benchmark", "loading"),  # the same verb
    ("loading", "train"),  # the images and the optimiser of a training run
    ("loading", "evaluate"),
    ("doctor", "doctor_page"),
    ("doctor", "memory"),
    ("doctor_page", "memory"),
    ("memory", "train"),  # a step with the optimiser that train would make
}


def floor(name):
    return next(i for i, names in enumerate(FLOORS) if name in names)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "glsim":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("glsim."))


def test_modules_import_from_lower_floors_only():
    wrong = []
    for path in (ROOT / "glsim").rglob("*.py"):
        name = "models" if path.parent.name == "models" else path.stem
        if name == "__init__":
            continue  # names for users, resolved lazily
        for other in imports(path):
            if other in ("__version__", name) and other != "models":
                continue
            if other == name == "models" or (name, other) in SIDEWAYS:
                continue
            if floor(other) >= floor(name):
                wrong.append(f"{path.name} imports {other}")
    assert not wrong


def test_every_module_has_a_floor():
    names = {p.stem for p in (ROOT / "glsim").glob("*.py")} | {"models"}
    assert names == set().union(*FLOORS)


def test_models_do_not_import_each_other():
    files = [p for p in (ROOT / "glsim" / "models").glob("*.py") if p.stem != "__init__"]
    for path in files:
        text = path.read_text()
        assert not any(f"glsim.models.{other.stem}" in text for other in files), path


def test_importing_glsim_and_its_settings_is_cheap():
    code = "import glsim, glsim.cli, glsim.config, glsim.data, glsim.copies, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
