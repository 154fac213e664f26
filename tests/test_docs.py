"""What the markdown files say is true: their code runs, their commands parse, their names and links exist."""

import contextlib
import importlib.util
import io
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, scene, small_model
from PIL import Image
from test_floors import FLOORS

import glsim
from glsim import cli
from glsim.crop import BOX_RULES
from glsim.selection import NEEDS_ATTENTION
from glsim.synthetic import species

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"pip", "git", "cd"}  # commands that are not ours to check


class Block(NamedTuple):
    """A fenced block of a markdown file."""

    page: Path
    line: int  # of its first line of code
    language: str
    text: str


def blocks(page):
    lines, start = page.read_text(encoding="utf-8").splitlines(), None
    for i, line in enumerate(lines):
        if line.startswith("```") and start is None:
            start = i + 1
        elif line.startswith("```"):
            yield Block(page, start + 1, lines[start - 1][3:].strip(), "\n".join(lines[start:i]) + "\n")
            start = None
    assert start is None, f"{page.name}: block at line {start} is not closed"


def commands():
    found = []
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash":
                for command in block.text.replace("\\\n", " ").splitlines():
                    if words := shlex.split(command, comments=True):
                        found.append(pytest.param(words, id=f"{page.stem}: {' '.join(words)}"))
    return found


def prose(page):
    """The text of a page without its blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page):
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the pages speak of: a bundle runs/flowers and an image photo.jpg."""
    labels = ["buttercup", "daffodil", "daisy", "iris", "snowdrop"]
    glsim.save(small_model(), tmp_path / "runs" / "flowers", labels=labels)
    scene((96, 64)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    registries = glsim.METRICS, BOX_RULES, NEEDS_ATTENTION  # a page may show how to add to them
    kept = [registry.copy() for registry in registries]
    yield tmp_path
    for registry, before in zip(registries, kept, strict=True):
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize("page", [p for p in PAGES if "\n```python\n" in p.read_text()], ids=lambda p: p.name)
def test_python_runs_in_order_and_prints_what_it_says(page, workplace):
    names, said = {}, None
    for block in blocks(page):
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
            said = out.getvalue()
        elif block.language == "output":
            assert said is not None, f"{page.name}, line {block.line}: no Python block stands above this output"
            assert said == block.text, f"{page.name}, line {block.line}"
            said = None


def test_the_readme_goes_from_an_image_to_an_answer(workplace):
    block = next(b for b in blocks(ROOT / "README.md") if b.language == "python")
    assert "photo.jpg" in block.text and len(block.text.splitlines()) <= 6
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(block.text, {})
    (answer,) = glsim.Predictor("runs/flowers")("photo.jpg")
    assert out.getvalue() == f"{answer.labels[0]} {answer.probabilities[0]}\n{answer.box}\n"


@pytest.mark.parametrize("words", commands())
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named from here
    program, *rest = words
    if program == "glsim":
        verb = cli.VERBS[rest[0]]
        assert isinstance(cli.parse(rest[0], verb, [w for w in rest[1:] if w != "--json"]), verb.settings)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert rest and set(rest) <= set(targets)
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
    else:
        assert program in ELSEWHERE, f"nothing here checks the command {program!r}"


def test_every_verb_is_shown():
    shown = {words.values[0][1] for words in commands() if words.values[0][0] == "glsim"}
    assert shown | {"quickstart"} == set(cli.VERBS)  # quickstart is shown as make quickstart


def tree():
    """The README's file tree: (path, the number of its floor or None)."""
    block = next(b for b in blocks(ROOT / "README.md") if b.text.startswith("glsim/\n"))
    folders = {}
    for line in block.text.splitlines():
        indent, name, floor = re.match(r"( *)(\S+)(?: +(\d)  )?", line).groups()
        path = folders.get(len(indent) - 2, ROOT) / name
        folders[len(indent)] = path
        yield path, floor and int(floor)


def test_the_file_tree_is_the_real_one():
    listed = dict(tree())
    missing = [str(path.relative_to(ROOT)) for path in listed if not path.exists()]
    assert not missing, f"in the tree of README.md, but not there: {missing}"
    unlisted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "glsim").rglob("*.py") if path not in listed}
    assert not unlisted, f"not in the tree of README.md: {sorted(unlisted)}"
    for path, floor in listed.items():
        if path.suffix == ".py":
            name = "models" if path.parent.name == "models" else path.stem
            assert name in FLOORS[floor], f"{path.name} does not stand on floor {floor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_functions_named_are_there(page):
    for module, name in re.findall(r"`(glsim[\w.]*):([\w.]+)`", page.read_text(encoding="utf-8")):
        found = import_module(module)
        for part in name.split("."):
            assert hasattr(found, part), f"{page.name} names {module}:{name}"
            found = getattr(found, part)


def test_paths_named_are_there():
    """`glsim/data.py`, `tests/test_floors.py` .. in running text."""
    for page in PAGES:
        for path in re.findall(r"`((?:glsim|tests|docs|recipes)/[\w./-]*)`", page.read_text(encoding="utf-8")):
            known = (ROOT / path).exists() or "NAME" in path
            assert known, f"{page.name} names {path}"


def test_the_picture_can_be_made(workplace, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("make_birds", ROOT / "docs" / "make_birds.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    monkeypatch.setattr(maker, "SIZE", 96)
    glsim.save(small_model(classes=3), "birds", labels=[bird.name for bird in species(3)])
    monkeypatch.setattr("sys.argv", ["make_birds.py", "birds", "--out", "new/birds.png"])
    maker.main()
    with Image.open("new/birds.png") as picture:
        assert picture.mode == "RGB" and picture.width == maker.WIDTH
    monkeypatch.setattr("sys.argv", ["make_birds.py", "runs/flowers"])
    with pytest.raises(SystemExit):
        maker.main()
    assert "species of the synthetic set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("registry", "heading"), [(glsim.METRICS, "Metrics"), (BOX_RULES, "Box rules")], ids=["metrics", "box rules"]
)
def test_method_lists_everything_there_is(registry, heading):
    section = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == set(registry)
