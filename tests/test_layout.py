"""The order of the folders: a file imports from its own folder and from those below it, by a string too."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "glsim"
GROUND = {"types", "files", "settings", "environment", "config"}  # files of the package itself; `__version__` too
ORDER = ["ground", "models", "data", "checkpoints", "interpret", "inference", "evaluation", "training", "cli"]
MODULE = re.compile(r"glsim((?:\.[a-z_0-9]+)+)(?::\w+)?")  # `glsim.models.glsim`, also with `:function` behind it


def floor(parts):
    return ORDER.index(parts[0] if parts[0] in ORDER else "ground")


def imports(path):
    """The modules of the package that a file imports, as parts of their names; by a string where it is all of it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "glsim":
            for name in node.names:
                yield [*node.module.split(".")[1:], name.name]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1:] for a in node.names if a.name.startswith("glsim."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (m := MODULE.fullmatch(node.value)):
            yield m[1].split(".")[1:]


def test_imports_only_run_towards_the_ground():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue  # names for users, imported when they are asked for
        wrong += [
            f"{path.relative_to(ROOT)}: {'.'.join(other)}" for other in imports(path) if floor(other) > floor(parts)
        ]
    assert not wrong


def test_every_file_lies_in_a_folder_of_the_order():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ORDER[1:])
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {
        *("__init__.py", "py.typed"),
        *(f"{name}.py" for name in GROUND),
    }


def test_tests_lie_as_the_package_does():
    folders = {path.parent.name for path in Path(ROOT, "tests").glob("*/test_*.py")}
    assert folders == {*ORDER[1:], "benchmarks"}


def test_methods_do_not_import_each_other():
    """One file a paper; what several share is in a module of the same folder that is no method."""
    from glsim.models import METHODS

    methods = [PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py") for module in METHODS.values()]
    for path in methods:
        others = {other.stem for other in methods if other != path}
        assert not [other for other in imports(path) if other[0] == "models" and other[1] in others], path


def test_importing_glsim_and_its_settings_is_cheap():
    code = "import glsim, glsim.cli, glsim.config, glsim.data.readers, glsim.data.duplicates, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
