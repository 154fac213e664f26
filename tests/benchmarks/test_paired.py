"""benchmarks/paired.py: runs from one start, paired; what is finished is left alone, shards share the rest."""

import json
from importlib import import_module

import pytest
import torch
import yaml
from conftest import TINY

from glsim.data import synthetic
from glsim.training import train


@pytest.fixture
def paired(script):
    return script("paired")


@pytest.fixture
def words(tmp_path):
    synthetic.write(tmp_path / "birds", classes=2, train=6, test=3, size=64)
    recipes = {"base": {"epochs": 9}, "plain": {"method": "plain", "options": {}, "epochs": 1}}
    for name, changes in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**TINY, **changes}))
    base, plain, birds, out = (str(tmp_path / name) for name in ("base.yaml", "plain.yaml", "birds", "out"))
    return [base, "--plain", plain, "--data", birds, "--out", out, "--seeds", "1", "2", "--epochs", "1"]


@pytest.mark.slow
def test_rows_of_every_variant(paired, words, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--masks", str(tmp_path / "birds" / "masks"), "--variants"]
    with pytest.raises(SystemExit, match="plain runs first"):
        paired.follow(paired.parse([*words, "--shard", "1/2"]))
    paired.follow(paired.parse([*words, "--variants"]))
    some = [*more, "published", "window", "none", "plain"]
    half = paired.follow(paired.parse([*words, "--shard", "1/2", *some]))
    assert {row["name"]: row["seeds"] for row in half["rows"]} == {
        "window": [1, 2],
        "plain": [1, 2],
        "plain_flip": [1, 2],
    }
    result = paired.follow(paired.parse([*words, "--shard", "0/2", *some]))
    assert result == json.loads((out / "paired.json").read_text()) and result["runs"] == result["of"] == 10
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["published", "window", "none", "plain", "plain_flip"]
    assert rows["published"]["difference"] is None and rows["published"]["cost"] == 1
    assert rows["none"]["cost"] < 0.6 and 0.9 < rows["plain_flip"]["cost"] < 1.2 and rows["none"]["where"] is None
    assert 0 < rows["window"]["where"]["area"][0] < 1
    window = rows["window"]
    naive = [100 * (a - b) / 6 for a, b in zip(window["correct"], rows["published"]["correct"], strict=True)]
    assert window["differences"] == pytest.approx(naive)
    mean, low, high = window["difference"]
    assert low <= mean <= high and mean == pytest.approx(sum(naive) / 2)
    assert [x["seed"] for x in window["mcnemar"]] == [1, 2, "pooled"]
    recipe = yaml.safe_load((out / "window" / "seed_2" / "train.yaml").read_text())
    assert recipe["init_from"] == str(out / "start" / "seed_2") and recipe["epochs"] == 1
    assert not list(out.glob("*/*/checkpoint")) or all(p.parts[-3] == "start" for p in out.glob("*/*/checkpoint"))
    assert (out / "paired.png").stat().st_size > 1000 and "| window |" in (out / "paired.md").read_text()
    log = out / "window" / "seed_1" / "log.jsonl"
    before = log.stat().st_mtime_ns
    capsys.readouterr()
    assert paired.follow(paired.parse([*words, *some])) == result
    assert log.stat().st_mtime_ns == before and "training" not in capsys.readouterr().err


def test_difference_and_p_by_hand(paired, words):
    a = paired.parse([*words])
    truth = tuple("aabb")
    ours = {1: (truth, torch.tensor([True, True, True, False])), 2: (truth, torch.tensor([True, True, True, True]))}
    theirs = {
        1: (truth, torch.tensor([True, False, False, False])),
        2: (truth, torch.tensor([True, True, False, True])),
    }
    base, row = paired.as_rows(a, {"published": theirs, "window": ours})
    assert row["differences"] == [50.0, 25.0] and row["difference"][0] == 37.5 and base["difference"] is None
    told = [(x["seed"], x["only_it"], x["only_other"], x["p"]) for x in row["mcnemar"]]
    assert told == [(1, 2, 0, 0.5), (2, 1, 0, 1.0), ("pooled", 3, 0, 0.25)]
    with pytest.raises(SystemExit, match="other images"):
        paired.as_rows(a, {"published": {1: (tuple("abab"), theirs[1][1])}, "window": ours})


def test_one_image_has_a_difference_without_interval(paired, words, tmp_path):
    a = paired.parse([*words])
    right, wrong = ({1: (("a",), torch.tensor([it]))} for it in (True, False))
    rows = paired.as_rows(a, {"published": wrong, "window": right})
    assert rows[1]["difference"] == [100, None, None]
    told = {"rows": rows, "data": "d", "recipe": "r", "epochs": 1, "runs": 2, "of": 2, "left_out": {}}
    assert "| +100.00 |" in paired.as_markdown(told)
    paired.draw(rows, "published", tmp_path / "d.png")
    assert (tmp_path / "d.png").stat().st_size > 1000
    sweep = import_module("sweep_synthetic")
    (row,) = sweep.as_rows({"window": {"top1": torch.ones(1), "difference": torch.ones(1)}})
    assert sweep.as_cell({"holds": [100, None, None], "holds - random": [40, None, None]}) == "100 (+40)"
    assert "| +100.0 |" in sweep.as_markdown({"rows": [row | {"scale": 1, "clutter": 0}], "boxes": []})


@pytest.mark.slow
def test_all_variants_can_be_built(paired, words):
    """At costs near the published rule's, but for one pass alone, two crops, and every patch asked."""
    a = paired.parse([*words, "--large", "96"])
    names = {**paired.RULES, **paired.CONTROLS}
    costs = {name: paired.operations(a, name) / paired.operations(a, "published") for name in names}
    two = {name: value for name, value in costs.items() if name != "none" and name.split("_")[0] != "plain"}
    assert min(two.values()) > 0.9 and max(two, key=two.get) in (
        "two_boxes",
        "evidence",
        "evidence_loss",
        "evidence_window",
    )
    assert costs["none"] < 0.6 and costs["plain"] < 0.6 and costs["plain_new_head"] == costs["plain"]


def test_plain_at_more_pixels(paired, words, tmp_path, capsys):
    """Starts from the same plain run, whose position embeddings are resampled."""
    some = [*words, "--seeds", "1", "--variants", "published", "plain_large"]
    result = paired.follow(paired.parse([*some, "--large", "96"]))
    (row,) = (row for row in result["rows"] if row["name"] == "plain_large")
    assert row["difference"] is not None and 0.9 < row["cost"] < 1.4
    recipe = yaml.safe_load((tmp_path / "out" / "plain_large" / "seed_1" / "train.yaml").read_text())
    assert recipe["image_size"] == 96 and recipe["init_from"] == str(tmp_path / "out" / "start" / "seed_1")
    assert "--large PIXELS" in paired.follow(paired.parse(some))["left_out"]["plain_large"]
    assert "plain_large left out" in capsys.readouterr().err


def test_other_methods_start_without_the_head(paired, words, tmp_path):
    """Theirs would fit: only `plain` goes on with it, the others with zeros, as GLSim does."""
    paired.follow(paired.parse([*words, "--seeds", "1", "--variants"]))
    start = tmp_path / "out" / "start" / "seed_1"
    trained = paired.load(start).state_dict()
    assert trained["head.weight"].any()
    assert {name for name in paired.VARIANTS if paired.start_of(start, name) == start} == {
        *paired.RULES,
        *paired.CONTROLS,
        *paired.MECHANISMS,
    } - {"plain_new_head"}
    for name in ("published", "plain_new_head", "ffvt"):
        model = train.create_model(**built(paired, words, name))
        train.init_from(model, paired.start_of(start, name))
        state = model.state_dict()
        assert all(not v.any() for k, v in state.items() if k.startswith("head."))
        assert all(torch.equal(v, trained[k]) for k, v in state.items() if k.startswith("backbone."))


def built(paired, words, name):
    s = paired.settings(paired.parse(words), paired.Path(words[0]), paired.VARIANTS[name], paired.Path("x"), 1, 1)
    return {
        "method": s.method,
        "backbone": s.backbone,
        "num_classes": 2,
        "image_size": s.image_size,
        "pretrained": False,
        "backbone_args": s.backbone_args,
        **s.options,
    }


def test_a_start_under_way_is_not_taken(paired, words, tmp_path):
    """Its metrics are there after the first epoch, but not all of its epochs."""
    paired.follow(paired.parse([*words, "--variants"]))
    log = tmp_path / "out" / "start" / "seed_2" / "log.jsonl"
    longer = [*words, "--plain-epochs", "2", "--shard", "1/2", "--variants", "none"]
    with pytest.raises(SystemExit, match="seed_1 is not finished"):
        paired.follow(paired.parse(longer))
    assert len(log.read_text().splitlines()) == 1 and not (tmp_path / "out" / "none").exists()


def test_a_finished_run_of_other_settings_is_refused(paired, words, tmp_path):
    some = [*words, "--seeds", "1", "--variants", "none"]
    paired.follow(paired.parse(some))
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({**yaml.safe_load(base.read_text()), "lr": 0.25}))
    with pytest.raises(paired.ConfigError, match=r"none.seed_1 was started with other settings: lr=0.25"):
        paired.follow(paired.parse(some))


@pytest.mark.slow
def test_table_of_all_that_is_there_against_any_variant(paired, words, tmp_path):
    """Later commands, and those that train nothing, keep the rows of earlier ones."""
    out = tmp_path / "out"
    some = [*words, "--seeds", "1", "--variants"]
    paired.follow(paired.parse([*some, "published", "none"]))
    paired.follow(paired.parse([*some, "centre"]))
    result = paired.follow(paired.parse([*some, "--against", "none"]))
    assert [row["name"] for row in result["rows"]] == ["published", "centre", "none"]
    assert json.loads((out / "paired.json").read_text())["against"] == "published"
    assert result == json.loads((out / "paired_against_none.json").read_text()) and result["against"] == "none"
    rows, told = (
        {row["name"]: row for row in r["rows"]} for r in (result, json.loads((out / "paired.json").read_text()))
    )
    assert rows["none"]["difference"] is None and told["published"]["difference"] is None
    assert rows["published"]["difference"][0] == pytest.approx(-told["none"]["difference"][0])


def test_a_backbone_that_does_not_suit_leaves_a_variant_out(paired, words, tmp_path, capsys):
    base = tmp_path / "base.yaml"
    pooled = {"backbone_args": {**TINY["backbone_args"], "class_token": False, "global_pool": "avg"}}
    base.write_text(yaml.safe_dump({**yaml.safe_load(base.read_text()), **pooled}))
    result = paired.follow(paired.parse([*words, "--seeds", "1", "--variants", "centred"]))
    assert "class_token: true" in result["left_out"]["centred"] and result["rows"] == []
    assert "centred left out" in capsys.readouterr().err


@pytest.mark.slow
def test_sweep_of_drawn_sets(paired, words, tmp_path):
    """Two cells of one seed: scale and clutter are those drawn, and nothing is done twice."""
    sweep, out = import_module("sweep_synthetic"), tmp_path / "sweep"
    some = [
        *words[:3],
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--classes",
        "2",
        "--train",
        "6",
        "--test",
        "2",
        "--size",
        "64",
    ]
    some += ["--scales", "1", "0.5", "--clutter", "0", "--mechanisms", "published", "plain", "--out", str(out)]
    result = sweep.follow(sweep.parse(some))
    rows = result["rows"]
    assert [(r["scale"], r["mechanism"]) for r in rows] == [
        (s, m) for s in (1, 0.5, None) for m in ("published", "plain", "plain_flip")
    ]
    one, other, both = (rows[i] for i in (1, 4, 7))  # plain: in each cell, and in all
    assert both["difference"][0] == pytest.approx((one["difference"][0] + other["difference"][0]) / 2)
    assert both["top1"][0] == pytest.approx((one["top1"][0] + other["top1"][0]) / 2)
    assert rows[6]["difference"] is None and rows[6]["holds - random"][0] == pytest.approx(
        sum(rows[i]["holds"][0] - rows[i]["random holds"][0] for i in (0, 3)) / 2
    )
    told = (out / "sweep.md").read_text()
    assert "| all |  | plain |" in told and "| rollout | " in told and "| 1, 0 | 0.5, 0 |" in told
    assert result == json.loads((out / "sweep.json").read_text()) and rows[0]["holds"] and not rows[1]["holds"]
    everything = json.loads((out / "scale_0.5_clutter_0" / "where_all.json").read_text())
    assert {"rollout", "rollout/random", "whole"} <= set(everything["targets"]["part"]["rows"])
    (box,) = (b for b in result["boxes"] if (b["scale"], b["metric"]) == (0.5, "rollout"))
    assert box["holds"][0] == pytest.approx(100 * everything["targets"]["part"]["rows"]["rollout"]["holds"][0])
    assert (out / "sweep.png").stat().st_size > 1000
    log = out / "scale_1_clutter_0" / "published" / "seed_1" / "log.jsonl"
    before = log.stat().st_mtime_ns
    assert sweep.follow(sweep.parse(some)) == result and log.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="test=2"):
        sweep.follow(sweep.parse([*some, "--test", "3"]))
