"""Loading beside the model: rates by a false clock, and who waits, with a loader and a model slowed down in turn."""

import json
import time

import pytest
import yaml
from conftest import TINY

from glsim import ConfigError, cli
from glsim.cli.bench_loading import Options
from glsim.training import throughput


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return str(file)


def test_a_rate_counts_whole_batches_after_two_that_warm_up():
    now, used = [0.0], []

    def use(batch):
        used.append(batch)
        now[0] += 100 if len(used) <= 2 else 2

    batches = [("images", [0] * 6)] * 50
    assert throughput.images_per_second(batches, use, 7, clock=lambda: now[0]) == 6 / 2
    assert len(used) == 2 + 4  # the fourth ends after 8 s


def slow(function, seconds):
    def slowly(*arguments, **named):
        time.sleep(seconds)
        return function(*arguments, **named)

    return slowly


@pytest.mark.parametrize(("slowed", "waits"), [("objective", "loader"), ("read", "model")])
def test_the_faster_one_waits(recipe, birds, monkeypatch, capsys, slowed, waits):
    plain = getattr(throughput, slowed)
    if slowed == "objective":
        monkeypatch.setattr(throughput, "objective", slow(plain, 0.2))
    else:
        monkeypatch.setattr(throughput, "read", lambda loader: map(slow(lambda batch: batch, 0.2), plain(loader)))
    words = ["bench", "loading", "--recipe", recipe, "--data", str(birds), "--seconds", "0.5", "--device", "cpu"]
    assert cli.main([*words, "--json", "--workers", "0", "--train.cache", "ram", "--train.batch_size", "3"]) == 0
    r = json.loads(capsys.readouterr().out)
    assert r["waits"] == waits and (r["loading"] < r["model"]) == (waits == "model")
    assert (r["workers"], r["cache"], r["batch_size"], r["images"]) == (0, "ram", 3, 18)
    assert r["cache_seconds"] is not None and "cpu" in r["environment"]["device"]
    assert 0 < r["together"] < 3 / 0.2  # the slower one holds both back


def test_the_text_says_the_same_and_out_keeps_it(recipe, birds, tmp_path, capsys):
    words = ["--seconds", "0.1", "--device", "cpu", "--train.mixup", "0.3", "--train.precision", "bf16", "--out"]
    assert cli.main(["bench", "loading", "--recipe", recipe, "--data", str(birds), *words, str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    r = json.loads((tmp_path / "o" / "bench.json").read_text())
    for kind in ("loading", "model", "together"):
        assert f"{kind:8} {r[kind]:9,.1f} images/s" in out
    other = {"model": "loader", "loader": "model"}[r["waits"]]
    assert f"the {r['waits']} waits for the {other}" in out and "cache filled" not in out
    assert "glsim on vit_tiny_patch16_224, 64 x 64 pixels, batches of 6; 0 workers, cache none; cpu" in out
    assert f"written: {tmp_path / 'o'}" in out


def test_wrong_settings_are_refused_by_name(recipe, birds, tmp_path, capsys):
    for given, said in (({"seconds": 0}, "seconds=0: above 0"), ({"workers": -1}, "workers=-1: at least 0")):
        with pytest.raises(ConfigError, match=said):
            Options(recipe=recipe, data="d", **given)
    assert Options(recipe=recipe, data="d").workers is None
    for words, code, said in (
        (["--recipe", recipe], 2, "data"),
        (["--recipe", recipe, "--data", str(birds), "--train.batch", "3"], 2, "tiny.yaml with --train: "),
        (["--recipe", recipe, "--data", str(tmp_path / "none")], 3, "does not exist"),
        (["--recipe", str(tmp_path / "none.yaml"), "--data", str(birds)], 2, "none.yaml cannot be read"),
    ):
        assert cli.main(["bench", "loading", *words]) == code
        assert said in capsys.readouterr().err
