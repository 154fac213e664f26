"""What pyproject.toml asks for and what the constraints files pin fit together."""

import re
import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
EVERY = re.search(r"^EVERY := (.*)$", MAKEFILE, re.M)[1].split(",")  # the extras that make installs anywhere


def asked(*extras):
    """The requirements of the package and of `extras`, those that an extra takes from another one included."""
    words = list(PROJECT["dependencies"])
    for extra in extras:
        words += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, words):
        if requirement.name == "glsim":
            yield from asked(*sorted(requirement.extras))
        else:
            yield requirement


def pins(name):
    lines = [line.split(" #")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    # No address, no hash, no local version such as +cpu: another machine may not have it.
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert not wrong, f"{name}: wanted NAME==VERSION, got {wrong}"
    found = {canonicalize_name(line.partition("==")[0]): Version(line.partition("==")[2]) for line in lines}
    assert len(found) == len(lines), f"{name} pins something twice"
    return found


@pytest.mark.parametrize("requirement", {str(r): r for r in asked(*EVERY)}.values(), ids=str)
def test_every_dependency_is_pinned_and_its_lower_bound_is_the_one_that_is_tried(requirement):
    name, (bound,) = canonicalize_name(requirement.name), list(requirement.specifier)
    assert bound.operator == ">=", f"{requirement}: a lower bound and nothing else"
    assert pins("constraints.txt")[name] in requirement.specifier
    assert pins("constraints-oldest.txt")[name] == Version(bound.version), f"{requirement}: run make constraints"


def test_lower_bounds_that_users_rely_on():
    bounds = {r.name: Version(next(iter(r.specifier)).version) for r in asked()}
    assert bounds["torch"] <= Version("2.11") and bounds["torchvision"] <= Version("0.26")


def test_pins_hold_for_what_make_installs():
    """All that is installed here in the versions of constraints.txt was installed with them."""
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    assert {"glsim", "uv", "pip"}.isdisjoint(oldest | newest)
    assert all(oldest[canonicalize_name(r.name)] <= newest[canonicalize_name(r.name)] for r in asked(*EVERY))
    compiled = re.search(r"foreach extra,([\w ]+),", MAKEFILE)[1].split()
    assert compiled == EVERY and "PINS ?= constraints.txt" in MAKEFILE
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()
