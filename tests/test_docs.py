"""What the markdown files say is true: their code runs, their commands parse, their names and links exist."""

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, parsed, scene, small_model
from PIL import Image
from test_layout import ORDER
from test_models import SIZES, refusal, takes
from timm.models.vision_transformer import VisionTransformer

import glsim
from glsim import cli
from glsim.data.catalog import SETS
from glsim.data.synthetic import species
from glsim.models import find_method
from glsim.models.backbone import NEEDS, build_backbone
from glsim.models.boxes import BOX_RULES, CONTROLS
from glsim.models.losses import TERMS
from glsim.models.scores import NEEDS_ATTENTION, NEEDS_MAPS, TITLES, find_metric
from glsim.training.config import Train

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {"pip", "git", "cd", "curl", "ray"}  # commands that are not ours to check, or elsewhere (test_serve.py)
SERVED = "http://127.0.0.1:7860"  # code that asks it is run by test_serve.py, with a server there


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
    """A folder with what the pages speak of: a bundle runs/flowers and an image photo.jpg. Its modules can be imported."""
    labels = ["buttercup", "daffodil", "daisy", "iris", "snowdrop"]
    glsim.save(small_model(), tmp_path / "runs" / "flowers", labels=labels)
    scene((96, 64)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # a page may show how to add to them
    registries = glsim.METRICS, glsim.METHODS, BOX_RULES, TERMS, NEEDS_ATTENTION, NEEDS_MAPS, TITLES
    kept = [registry.copy() for registry in registries]
    yield tmp_path
    for registry, before in zip(registries, kept, strict=True):
        registry.clear()
        registry.update(before)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{tmp_path}/"):
            del sys.modules[name]


def run_block(block, names):
    """Run a block of Python and return what it prints. One that begins with `# NAME.py` becomes that file instead."""
    if file := re.match(r"# (\w+\.py)\n", block.text):
        Path(file[1]).write_text(block.text, encoding="utf-8")
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), names)
    return out.getvalue()


@pytest.mark.parametrize("page", [p for p in PAGES if "\n```python\n" in p.read_text()], ids=lambda p: p.name)
def test_python_runs_in_order_and_prints_what_it_says(page, workplace):
    names, said = {}, None
    for block in blocks(page):
        if block.language == "python" and SERVED not in block.text:
            said = run_block(block, names)
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
    label, probability, box = re.fullmatch(r"(\w+) (\S+)\n(.+)\n", out.getvalue()).groups()
    assert (label, box) == (answer.labels[0], str(answer.box))
    assert float(probability) == pytest.approx(answer.probabilities[0], abs=1e-6)


@pytest.mark.parametrize("words", commands())
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named from here
    program, *rest = words
    if program == "glsim":
        name, rest = cli.split_verb(rest)
        assert isinstance(parsed(name, [w for w in rest if w != "--json"]), cli.load_verb(name).options)
    elif program in ("torchrun", "accelerate"):  # the launcher's own words, then ours
        verb = rest[rest.index("glsim.cli") + 1 :]
        assert isinstance(parsed(verb[0], verb[1:]), cli.load_verb(verb[0]).options)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert rest and set(rest) <= set(targets)
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
    else:
        assert program in ELSEWHERE, f"nothing here checks the command {program!r}"


def test_every_verb_is_shown():
    shown = {cli.split_verb(words.values[0][1:])[0] for words in commands() if words.values[0][0] == "glsim"}
    assert shown | {"quickstart"} == set(cli.verb_names())  # quickstart is shown as make quickstart


def test_the_file_tree_is_the_real_one():
    block = next(b for b in blocks(ROOT / "README.md") if b.text.startswith("glsim/\n"))
    listed = [line.split()[0] for line in block.text.splitlines() if line.startswith("  ")]
    assert [name.rstrip("/") for name in listed if name.endswith("/")] == ORDER[:0:-1]
    top = {line.split()[0] for line in block.text.splitlines() if not line.startswith(" ")}
    assert all((ROOT / name).is_dir() for name in top)


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
    """`glsim/data/readers.py`, `tests/test_layout.py` .. in running text."""
    for page in PAGES:
        for path in re.findall(r"`((?:glsim|tests|docs|recipes)/[\w./-]*)`", page.read_text(encoding="utf-8")):
            known = (ROOT / path).exists() or "NAME" in path
            assert known, f"{page.name} names {path}"


def source(function):
    """The file of a function, or of the one that a `partial` calls, from the root."""
    return str(Path(inspect.getsourcefile(getattr(function, "func", function))).relative_to(ROOT))


def test_contributing_names_the_files_that_an_addition_touches():
    """In brackets: those that hold what is there now, with NAME for its own name, and one file of tests."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^- \*\*A ([a-z ]+)\*\* \((`[^)]+)\):", text, re.M))
    named = {what: re.findall(r"`([^`]+)`", files) for what, files in told.items()}
    methods = {source(find_method(name).build).replace(f"/{name}.py", "/NAME.py") for name in glsim.METHODS}
    verbs = {source(cli.load_verb(n).show).replace(f"/{n.replace(' ', '_')}.py", "/NAME.py") for n in cli.verb_names()}
    readers = {source(known.read) for known in SETS.values() if known.read}
    assert {what: {path for path in paths if path.startswith("glsim/")} for what, paths in named.items()} == {
        "metric": {source(metric) for metric in glsim.METRICS.values()},
        "method": methods | {source(find_method), "glsim/training/recipes/DATA_NAME.yaml"},
        "data set": {"glsim/data/catalog.csv"} | readers,
        "verb": verbs,
    }
    for what, paths in named.items():
        (tests,) = (path for path in paths if path.startswith("tests/"))
        assert (ROOT / tests).is_file() or what == "verb", what


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


def section(heading, marks="##", page="method.md"):
    """The text under a heading of a page in docs/, up to the next one of its level or above."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").split(f"\n{marks} {heading}\n")[1]
    return re.split(rf"^#{{2,{len(marks)}}} ", text, maxsplit=1, flags=re.M)[0]


def rows(text):
    """The first name of every row of the tables in `text`."""
    return re.findall(r"^\| `(\w+)` \|", text, re.M)


@pytest.mark.parametrize(
    ("registry", "heading"),
    [
        (glsim.METRICS, "Metrics"),
        (BOX_RULES, "Box rules"),
        (CONTROLS, "Controls"),
        (glsim.METHODS, "Methods"),
        (TERMS, "Loss terms"),
    ],
    ids=["metrics", "box rules", "controls", "methods", "loss terms"],
)
def test_method_lists_everything_there_is(registry, heading):
    assert sorted(rows(section(heading))) == sorted(registry)


def test_metrics_have_the_titles_and_needs_that_pictures_says():
    text = section("From the command line", page="pictures.md")
    lines = re.findall(r"^\| ([^|`]+) \| (`.*?`) \| .* \| (maps|logits)? ?\|$", text, re.M)
    told = {
        name.strip("` "): (title, reads)
        for titles, names, reads in lines
        for title, name in zip(titles.split(", "), names.split(", "), strict=True)
    }
    reads = {"": set(glsim.METRICS) - NEEDS_ATTENTION, "maps": NEEDS_MAPS, "logits": NEEDS_ATTENTION - NEEDS_MAPS}
    assert told == {name: (TITLES[name], kind) for kind, names in reads.items() for name in names}


def test_methods_are_what_the_table_says():
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section("Methods").splitlines() if "|" in line
    ]
    told = {cells[0].strip("`"): cells[1:] for cells in lines if cells[0].startswith("`")}
    for name in glsim.METHODS:
        *_, happens, needs = told[name]
        method = find_method(name)
        assert tuple(re.findall(r"`(\w+)`", needs)) == method.needs and set(method.needs) <= set(NEEDS)
        assert ("crop" in happens) == method.crops, name


def test_metrics_have_the_parameters_that_method_says():
    for names, given in re.findall(r"^\| ([a-z, ]+) \| (`.*) \| `", section("Metrics"), re.M):
        for name in names.split(", "):
            parameters = list(inspect.signature(glsim.METRICS[name]).parameters.values())[1:]
            assert {p.name for p in parameters} == set(re.findall(r"`(\w+)", given)), name
            said = re.findall(r"`(\w+=-?\d+)`", given)
            assert said == [f"{p.name}={p.default}" for p in parameters if p.default is not None], name


def keywords(build):
    return {p.name: p.default for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("method", glsim.METHODS)
def test_methods_have_the_options_that_method_says(method):
    module = import_module(glsim.METHODS[method])
    shared = keywords(build_backbone)
    own = {name: default for name, default in keywords(module.build).items() if name not in shared}
    text = section(method, "###").replace("\n", " ")
    said = re.search(r"Options: (.*?)\. From the paper", text)
    said = re.findall(r"`(\w+=[^`]+)`", said[1]) if said else []
    assert sorted(said) == sorted(f"{k}={v}" for k, v in (own | find_method(method).encoder).items())
    assert said or "No options." in text


def backbones():
    """The rows of the table of backbones: (timm name, method, what stands in the cell)."""
    head, _, *lines = [line.strip("| ").split(" | ") for line in section("Backbones").splitlines() if line[:1] == "|"]
    for first, *cells in lines:
        for methods, cell in zip(head[1:], cells, strict=True):
            yield from ((re.search(r"`(\w+)`", first)[1], method, cell) for method in methods.split(", "))


@pytest.mark.parametrize("backbone", sorted({backbone for backbone, _, _ in backbones()}))
def test_methods_take_the_backbones_that_method_says(backbone):
    """As the table of refusals has it, which test_models.py tries; a network that is not among those there is built."""
    told = {method: cell for name, method, cell in backbones() if name == backbone}
    if backbone in SIZES:
        words = {None: "yes", True: "`stride=None`", False: "no"}
        assert told == {m: words[refusal(m, backbone) and takes(m, backbone)] for m in told}
        return
    for method, cell in told.items():
        with contextlib.nullcontext() if cell == "yes" else pytest.raises(glsim.ConfigError):
            glsim.create_model(method, backbone, 5)


def test_methods_have_the_embeddings_that_new_classes_says():
    head, _, *lines = [
        line.strip("|").split("|")
        for line in section("Which vector", page="new_classes.md").splitlines()
        if line[:1] == "|"
    ]
    names = [cell.strip(" `") for cell in head]
    told = {}
    for line in lines:
        method, *cells = (cell.strip(" `") for cell in line)
        told[method] = {name for name, cell in zip(names[1:], cells, strict=True) if cell}
    assert set(told) == set(glsim.METHODS)
    for method, embeddings in told.items():
        assert set(find_method(method).embeddings) == embeddings, method  # test_models.py holds the models to that


def test_every_method_stands_in_the_table_of_backbones():
    assert {method for _, method, _ in backbones()} == set(glsim.METHODS)


def test_a_metric_takes_15_lines_and_is_the_one_that_is_used(workplace):
    first = next(b for b in blocks(ROOT / "docs" / "extend.md") if b.language == "python")
    assert len(first.text.splitlines()) <= 15
    known, names = set(glsim.METRICS), {}
    assert run_block(first, names)
    (new,) = set(glsim.METRICS) - known
    model, images = names["model"], names["images"]
    assert model.metric == new and model.config.options["metric"] == new

    f = model.features(images)
    mean = f.patches.mean(dim=1)
    for b, (patches, chosen) in enumerate(zip(f.patches, model(images).selection.indices, strict=True)):
        scores = [torch.cosine_similarity(z, f.cls[b], 0) - torch.cosine_similarity(z, mean[b], 0) for z in patches]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[: model.top_o]
        assert chosen.tolist() == best

    heatmaps = glsim.explain(model, images, metric=new)
    assert heatmaps.shape == (2, 64, 64) and heatmaps.dtype == "float32"
    assert heatmaps.min() >= 0 and heatmaps.max() <= 1
    assert abs(heatmaps - glsim.explain(model, images, metric="gls_cos")).max() > 0.01
    first_patch = torch.eye(f.patches.shape[1])[:1].repeat(len(images), 1, 1)
    glsim.METRICS[new] = lambda f: first_patch
    assert model(images).selection.indices[:, 0].tolist() == [0, 0]
    peaks = glsim.explain(model, images, metric=new).reshape(2, -1).argmax(axis=1)
    assert (peaks // 64 < 16).all() and (peaks % 64 < 16).all()


def parity():
    """The rows of parity.md: (there, here)."""
    for line in (ROOT / "docs" / "parity.md").read_text(encoding="utf-8").splitlines():
        cells = re.fullmatch(r"\| (.+?) \| (.+) \|", line)
        if cells and cells.groups() != ("there", "here"):
            yield pytest.param(*cells.groups(), id=cells[1])


@pytest.mark.parametrize(("there", "here"), list(parity()))
def test_what_parity_says_is_here_is_here(there, here):
    """A row names a key, an option, a method, a metric or a verb that exists, or it is left out for a reason."""
    names = re.findall(r"`([^`]+)`", here)
    assert names or here.startswith("left out: "), f"{there}: nothing here that can be looked up"
    for name in names:
        assert is_here(name), f"parity.md names {name}"


def is_here(name):
    if launched := re.fullmatch(r"(?:accelerate launch -m glsim\.cli|glsim) (.+)", name):
        verb, words = cli.split_verb([word for word in launched[1].split() if word != ".."])
        known = verb in cli.verb_names()
        there = {f.name for f in dataclasses.fields(cli.load_verb(verb).options)} if known else set()
        options = [word for word in words if word.startswith("--")]
        return known and {option[2:].partition(".")[0].replace("-", "_") for option in options} <= there
    if name.startswith("python "):
        return (ROOT / name.split()[1]).is_file()
    if name.startswith("backbone_args."):
        return name.partition(".")[2] in inspect.signature(VisionTransformer).parameters
    if name.startswith("options."):
        return name.partition(".")[2] in set(create_model_options())
    fields = {f.name for f in dataclasses.fields(Train)}
    if name in fields | set(glsim.METHODS) | set(CONTROLS) | {"none"} | WORDS:
        return True
    try:
        return bool(find_metric(name))
    except glsim.ConfigError:
        return False


def test_a_row_of_parity_cannot_name_what_is_not_there():
    for name in (
        "glsim demo",
        "glsim explain --blocks",
        "options.topo",
        "backbone_args.x",
        "maws:head=3",
        "lrr",
        "planned",
    ):
        assert not is_here(name), name


# Values, not keys.
WORDS = {"avg", "square", "short", "random", "resized", "centre", "fp16", "bf16"}


def create_model_options():
    for module in glsim.METHODS.values():
        yield from (p.name for p in inspect.signature(import_module(module).build).parameters.values())
    yield from inspect.signature(build_backbone).parameters
