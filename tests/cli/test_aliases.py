"""Old spellings of verbs: what they become, the note, and what is left alone."""

import pytest

from glsim import cli
from glsim.cli import aliases
from glsim.cli.aliases import translate


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("explain m a.png --contrast A B --out o", "explain contrast m a.png --classes A B --out o", "--contrast"),
        ("explain m a.png --out o --layers", "explain layers m a.png --out o", "--layers"),
        ("bench --loader r.yaml --data d", "bench loading --recipe r.yaml --data d", "--loader"),
        ("bench --loader=r.yaml --data d", "bench loading --recipe=r.yaml --data d", "--loader"),
        ("predict m a --engine ray --out o", "predict bulk m a --out o", "--engine ray"),
        ("predict m a --engine=ray --out o", "predict bulk m a --out o", "--engine ray"),
    ],
)
def test_old_spellings_are_translated(old, new, said, monkeypatch):
    monkeypatch.setattr(aliases, "_is_verb", lambda name: True)
    words, note = translate(old.split())
    verb, now = new.split()[:2]
    assert words == new.split() and note == f"{verb} {said} is now: glsim {verb} {now}"
    assert translate(words) == (words, None)
    monkeypatch.setattr(aliases, "_is_verb", lambda name: False)  # there is no such verb yet
    assert translate(old.split()) == (old.split(), None)


@pytest.mark.parametrize(
    "words",
    ["", "eval m --layers", "predict m a --engine", "explain m -- --layers", "-h"],
)
def test_everything_else_is_left_alone(words, monkeypatch):
    monkeypatch.setattr(aliases, "_is_verb", lambda name: True)
    assert translate(words.split()) == (words.split(), None)


@pytest.mark.parametrize("alias", [a for a in aliases.ALIASES if aliases._is_verb(a.now)], ids=lambda a: a.now)
def test_the_note_is_told_and_the_options_are_those_of_the_new_verb(alias, capsys):
    assert alias.now in cli.verb_names()
    value = alias.value or ("A" if alias.renamed else None)
    assert cli.main([alias.verb, alias.option, *filter(None, [value]), "--help"]) == 0
    told = capsys.readouterr()
    said = " ".join(filter(None, [alias.verb, alias.option, alias.value]))
    assert told.out.startswith(f"usage: glsim {alias.now}")
    assert f"note: {said} is now: glsim {alias.now}\n" in told.err
    if alias.renamed:
        assert alias.renamed in told.out
