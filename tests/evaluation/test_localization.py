"""The verb: masks of every kind found and read, measured in the network's view, beside controls."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_model, write
from PIL import Image

import glsim
from glsim import cli
from glsim.checkpoints.bundle import preprocessing_of
from glsim.cli.localize import Options, show
from glsim.data.images import open_image
from glsim.data.masks import Masked, find_masks, read_mask, to_view
from glsim.evaluation import localization
from glsim.evaluation.localization import evaluate_localization, measure
from glsim.evaluation.localization_metrics import BOX_MEASURES, measure_boxes, measure_scores
from glsim.evaluation.statistics import as_numbers
from glsim.interpret.heatmaps import selections_of


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("localize") / "bundle"
    glsim.save(small_model(classes=3), folder, labels=["a", "b", "c"])
    return str(folder)


def png(path, values, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).convert(mode).save(path)
    return path


def test_rows_are_the_models_own_selections(source, birds):
    model = glsim.load(source)
    images = find_masks(birds / "test", birds / "masks")
    one, all_at_once = (
        measure(model, images, [None, "random"], True, size == 9, size, seed=3).targets for size in (2, 9)
    )
    names = [
        "gls_border",
        "gls_border/centre",
        "gls_border/random",
        "whole",
        "random",
        "random/centre",
        "random/random",
    ]
    for target in ("object", "part"):
        assert sorted(one[target]) == sorted(names)
        for row, columns in one[target].items():
            for name, value in columns.items():
                torch.testing.assert_close(value, all_at_once[target][row][name], equal_nan=True, atol=1e-5, rtol=1e-5)
    p = preprocessing_of(model)
    for i, image in enumerate(images[:3]):
        photograph = open_image(image.path)
        pixels = glsim.interpret.heatmaps.eval_transform(p)(photograph)[None]
        ((_, selection, _),) = selections_of(model, pixels, [None])[1]
        views = to_view(read_mask(image.masks["part"], photograph.size), p)
        found = measure_boxes(selection.boxes[:, None], *(v[None] for v in views))
        for name in BOX_MEASURES:
            value = one["part"]["gls_border"][name][i]
            torch.testing.assert_close(value, found[name][0, 0], equal_nan=True)
        found = measure_scores(selection.scores, selection.grid, *(v[None] for v in views))
        for name, value in found.items():
            torch.testing.assert_close(one["part"]["gls_border"][name][i], value[0], equal_nan=True)
        left, top, right, bottom = selection.boxes[0].tolist()
        width, height = right - left, bottom - top
        free = np.array([64 - width, 64 - height])
        assert [left, top] != (free // 2).tolist()
        shares = np.random.default_rng([3, i]).random((16, 2))
        for control, corners in (
            ("centre", [free // 2]),
            ("random", [np.maximum(np.ceil(share * (free + 1)).astype(int) - 1, 0) for share in shares]),
        ):
            cuts = [np.s_[y : y + height, x : x + width] for x, y in corners]
            inside, counted = (np.array([view.numpy()[cut].sum() for cut in cuts]) for view in views)
            row = one["part"][f"gls_border/{control}"]
            assert row["box_recall"][i].item() == pytest.approx((inside / views[0].sum().item()).mean(), abs=1e-6)
            assert row["box_precision"][i].item() == pytest.approx((inside / counted).mean(), abs=1e-6)
    rows = one["object"]
    for control in ("centre", "random"):
        torch.testing.assert_close(rows[f"gls_border/{control}"]["area"], rows["gls_border"]["area"])
    assert (rows["whole"]["area"] == 1).all() and (rows["whole"]["box_recall"] == 1).all()


def test_a_border_is_neither_and_draws_are_the_images_own(source, tmp_path):
    trimap = np.full((64, 64), 2)
    trimap[16:56, 8:48], trimap[24:48, 16:40] = 3, 1
    file = png(tmp_path / "masks" / "x.png", trimap)
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "x.jpg")
    model = glsim.load(source, box="inclusive")  # smaller than that of moments: places tell them apart
    images = [Masked(tmp_path / "x.jpg", {"object": file})] * 2
    rows, others = (measure(model, images, [None], controls=True, seed=s).targets["object"] for s in (0, 1))
    inside, counted = to_view(read_mask(file, (64, 64)), preprocessing_of(model))
    share = inside.sum() / counted.sum()
    assert share > 1.2 * inside.float().mean()
    torch.testing.assert_close(rows["whole"]["box_precision"], share.expand(2))
    pixels = glsim.interpret.heatmaps.eval_transform(preprocessing_of(model))(open_image(images[0].path))[None]
    ((_, selection, _),) = selections_of(model, pixels, [None])[1]
    found = measure_scores(selection.scores, selection.grid, inside[None], counted[None])
    plain = measure_scores(selection.scores, selection.grid, inside[None], torch.ones_like(counted)[None])
    for name in ("energy", "auc"):
        torch.testing.assert_close(rows["gls_border"][name], found[name].expand(2))
        assert (found[name] - plain[name]).abs() > 1e-3
    first, second = rows["gls_border/random"]["box_recall"].tolist()
    assert len({first, second, *others["gls_border/random"]["box_recall"].tolist()}) == 4
    torch.testing.assert_close(rows["gls_border"]["box_recall"], others["gls_border"]["box_recall"])


def test_the_verb(source, birds, tmp_path, capsys):
    words = ["localize", source, "--images", str(birds / "test"), "--masks", str(birds / "masks"), "--resamples", "200"]
    assert cli.main([*words, "--metrics", "all", "--controls", "--json", "--out", str(tmp_path / "r.json")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "r.json").read_text()) and result["count"] == 9
    assert list(result["targets"]) == ["object", "part"]
    for found in result["targets"].values():
        assert set(glsim.METRICS) <= set(found["rows"]) and "whole" in found["rows"]
        for row in found["rows"].values():
            for mean, low, high in filter(None, row.values()):
                assert low - 1e-9 <= mean <= high + 1e-9 and 0 <= mean <= 1
        gain = found["gains"]["psm"]["coverage - random"]
        own, control = (found["rows"][name]["coverage"][0] for name in ("psm", "psm/random"))
        assert gain[0] == pytest.approx(own - control)
    assert cli.main([*words, "--metrics", "all", "--controls"]) == 0
    text = capsys.readouterr().out
    assert "centre, same size" in text and "whole image" in text and "coverage of GLS cos - random box" in text
    few = evaluate_localization(source, birds / "test", birds / "masks" / "part", limit=8)
    assert few.count == 8 and list(few.targets) == ["object"] and list(few.targets["object"].gains) == []
    assert cli.main([*words[:4], "--masks", str(tmp_path)]) == 3
    assert "has no mask in" in capsys.readouterr().err


def test_the_verb_with_boxes_and_points(source, birds, tmp_path, capsys):
    """Boxes around the masks of the part: in every measure of a box against it, what the masks of these boxes give."""
    rows, points, centred = [], [], tmp_path / "masks"
    for image in find_masks(birds / "test", birds / "masks" / "part")[:7]:
        levels, key = np.asarray(read_mask(image.masks["object"], (64, 64))), image.path.relative_to(birds)
        left, top, right, bottom = Image.fromarray(levels).getbbox()
        rows.append(f"{key},{left},{top},{right},{bottom}")
        points += [f"{key},low,{left},{top}", f"{key},high,{right - 0.5},{bottom - 0.5}", f"{key},away,0,0"]
        levels = np.zeros((64, 64))
        levels[top:bottom, left:right] = 255
        png(centred / key.with_suffix(".png"), levels)
    boxes = write(tmp_path / "boxes.csv", "path,left,top,right,bottom", *rows, "gone.jpg,1,1,5,5")
    parts = write(tmp_path / "parts.csv", "path,part,x,y", *points)
    words = ["localize", source, "--images", str(birds / "test"), "--resamples", "100", "--controls"]
    words += ["--boxes", str(boxes), "--points", str(parts)]
    assert cli.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["count"] == 7 and result["masks"] is None and result["boxes"] == str(boxes)
    assert [len(images) for images in result["without"].values()] == [2, 2]
    assert result["unused"] == {"boxes": 1, "points": 0} and result["scaled"] == result["cut"] == 0
    found = result["targets"]["box"]
    kept = [line.split(",")[0] for line in rows]
    drawn = {image.path.relative_to(birds).as_posix(): image for image in find_masks(birds / "test", birds / "masks")}
    images = [Masked(drawn[key].path, {"box": centred / f"{key[:-4]}.png"}) for key in kept]
    expected = localization.summarise(
        measure(glsim.load(source), images, [None, "random"], True).targets["box"], 100, 0
    )
    for row, values in expected.rows.items():
        for name, value in values.items():
            assert found["rows"][row][name] == pytest.approx(value, abs=1e-6), (row, name)
        assert set(found["rows"][row]) - set(values) == {"parts", "parts/low", "parts/high", "parts/away"}
    assert found["rows"]["whole"]["parts/away"][0] == 0  # cut off by the centre crop: in no box
    assert found["rows"]["whole"]["parts"][0] < 1
    assert found["rows"]["whole"]["parts/low"][0] == 1
    gain = found["gains"]["gls_border"]["parts - random"][0]
    own, control = (found["rows"][name]["parts"][0] for name in ("gls_border", "gls_border/random"))
    assert gain == pytest.approx(own - control)
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert f"2 images have no boxes in {boxes}, and are left out: {birds / 'test'}" in text
    assert f"1 images of {boxes} are not among these" in text and "parts inside the box of GLS border: " in text
    assert cli.main(["localize", source, "--images", str(birds / "test"), "--points", str(parts)]) == 2
    assert "nothing says where the objects of these images are; give masks or boxes" in capsys.readouterr().err
    with pytest.raises(glsim.ConfigError, match="give masks or boxes"):
        evaluate_localization(source, birds / "test")


def test_what_was_done_to_boxes_is_told(source, birds, tmp_path):
    first, second = (image.path for image in find_masks(birds / "test", birds / "masks")[:2])
    head = "path,left,top,right,bottom,width,height"
    boxes = write(tmp_path / "b.csv", head, f"{first},20,20,90,99,128,128", f"{second},20,20,50,99,64,64")
    found = evaluate_localization(source, birds / "test", boxes=boxes)
    assert (found.count, found.scaled, found.cut, found.targets["box"].left_out) == (2, 1, 1, 0)
    text = show(found, Options(source=source, images="i", boxes="b"))
    assert "annotations of 1 images were drawn on copies in another size, and are scaled" in text
    assert "boxes of 1 images reach over the edge of the image, and are cut" in text and "parts" not in text
    write(boxes, head, f"{first},20,20,20,30,64,64", f"{second},20,20,50,99,64,64")
    with pytest.raises(glsim.DataError, match=r"b.csv, line 2: box 20,20,20,30 is empty or turned round"):
        evaluate_localization(source, birds / "test", boxes=boxes)
    left = evaluate_localization(source, birds / "test", boxes=boxes, skip_bad=True)
    assert left.count == 1 and "line 2: box 20,20,20,30 is empty" in left.skipped[0]


def test_a_place_that_says_nothing_is_left_out_of_the_mean_over_places():
    inside, counted = torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    inside[0, 12:] = counted[0, 10:] = True
    places = torch.tensor([[[0, 0, 20, 10], [0, 10, 20, 20]]])  # the first on the border alone
    found = localization._mean(measure_boxes(places, inside, counted))
    assert found["box_precision"].item() == pytest.approx(0.8) and found["box_recall"].item() == 0.5


def test_the_images_are_drawn_once_for_all_rows_of_a_target(monkeypatch):
    calls = []
    monkeypatch.setattr(localization, "as_numbers", lambda *args: calls.append(args) or as_numbers(*args))
    g = torch.Generator().manual_seed(0)
    rows = {
        row: {name: torch.rand(8, generator=g) for name in BOX_MEASURES} for row in ("a", "a/centre", "a/random", "b")
    }
    found = localization.summarise(rows, 100, 3)
    assert len(calls) == 1 and list(found.gains) == ["a"] and list(found.rows) == list(rows)
    for row, columns in rows.items():
        for name, told in as_numbers(columns, 100, 3).items():
            assert found.rows[row][localization.KEYS.get(name, name)] == pytest.approx(told)
    gain = as_numbers({"x": rows["a"]["iou"] - rows["a/centre"]["iou"]}, 100, 3)["x"]
    assert found.gains["a"]["iou - centre"] == pytest.approx(gain)


def test_curves_stand_beside_the_measures(source, birds):
    """Written down for every mechanism, the same in batches of any size, and the model's own answers."""
    model, images = glsim.load(source), find_masks(birds / "test", birds / "masks" / "part")[:3]
    model.config = replace(model.config, calibration={"temperature": 2.5})
    one, together = (measure(model, images, ["gls_cos", "random"], False, True, size) for size in (1, 3))
    assert sorted(one.curves) == ["gls_cos", "random"]
    for row, curves in one.curves.items():
        assert curves.removed[0] == 0 and curves.kept[-1] == 1 and len(curves.kept) == len(curves.insertion)
        for name in ("deletion", "insertion"):
            assert getattr(curves, name) == pytest.approx(getattr(together.curves[row], name), abs=1e-4)
            areas = one.targets["object"][row][name]
            assert areas.shape == (3,) and areas.mean().item() == pytest.approx(
                (sum(getattr(curves, name)) - (getattr(curves, name)[0] + getattr(curves, name)[-1]) / 2) / 9, abs=1e-5
            )
    best = [glsim.Predictor(model)(image.path)[0].probabilities[0] for image in images]
    whole = sum(best) / 3
    assert one.curves["gls_cos"].deletion[0] == pytest.approx(whole, abs=1e-5)
    assert one.curves["random"].insertion[-1] == pytest.approx(whole, abs=1e-5)


def test_objects_that_are_lost_are_left_out(source, tmp_path):
    """One outside of the crop, one that nearest-neighbour resizing leaves out: of every number of a row."""
    height, _ = preprocessing_of(glsim.load(source)).resized((100, 100))
    seen = Image.fromarray(np.arange(100, dtype=np.uint8)[None]).resize((height, 1), Image.Resampling.NEAREST)
    lost = min(set(range(40, 60)) - set(np.asarray(seen)[0].tolist()))
    for i, place in enumerate([np.s_[40:60, 40:60], np.s_[0:2, 0:2], np.s_[lost, 40:60]]):
        values = np.zeros((100, 100))
        values[place] = 255
        png(tmp_path / "masks" / f"{i}.png", values)
        png(tmp_path / f"{i}.png", np.random.default_rng(i).integers(0, 255, (100, 100)))
    words = dict(masks=tmp_path / "masks", controls=True, faithfulness=True)
    found = evaluate_localization(source, tmp_path / "*.png", **words)
    alone = evaluate_localization(source, tmp_path / "0.png", **words)
    target, expected = found.targets["object"], alone.targets["object"]
    assert found.count == 3 and target.left_out == 2 and expected.left_out == 0
    for row, values in expected.rows.items():
        for name, value in values.items():
            assert target.rows[row][name] == pytest.approx(value, abs=1e-4), (row, name)  # pixels imputed to 1e-4
    mean, low, high = target.rows["gls_border"]["coverage"]
    assert 0 <= mean <= 1 and low is None and high is None  # one image has no interval
    text = show(found, Options(source=source, images="i", masks="m"))
    assert f"{100 * mean:.1f}" in text.split() and "+- half" in text.splitlines()[0]
    assert "object (2 images left out: no pixel of it is left in the network's view)" in text


def test_bad_images_and_masks_are_known_first(source, tmp_path, capsys):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for i in range(4):
        png(images / f"{i}.png", np.random.default_rng(i).integers(0, 255, (70, 80)))
        png(masks / f"{i}.png", np.ones((70, 80)) if i else np.zeros((70, 80)))
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:3000])
    png(masks / "3.png", np.ones((70, 70)))
    words = dict(images=images, masks=masks)
    with pytest.raises(glsim.DataError, match=r"0\.png: an empty mask"):
        evaluate_localization(tmp_path / "no bundle", **words)
    given = ["localize", source, "--images", str(images), "--masks", str(masks), "--skip-bad"]
    assert cli.main([*given, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["count"] == 1 and len(result["skipped"]) == 3
    for said, told in zip(("0.png: an empty", "1.png: truncated", "3.png is of 70"), result["skipped"], strict=True):
        assert said in told
    assert cli.main(given) == 0
    assert f"skipped 3 images:\n  {masks / '0.png'}: an empty mask" in capsys.readouterr().out
    with pytest.raises(glsim.DataError, match=r"no image is left: .*0\.png: an empty mask"):
        evaluate_localization(source, images / "0.png", masks, skip_bad=True)


def test_out_is_tried_first(tmp_path, birds):
    words = dict(source=tmp_path / "no bundle", images=birds / "test", masks=birds / "masks")
    with pytest.raises(glsim.DataError, match=r"out=.* is a folder; name a file"):
        evaluate_localization(out=tmp_path, **words)
    with pytest.raises(glsim.GlsimError, match="no bundle"):
        evaluate_localization(out=tmp_path / "new" / "deep" / "r.json", **words)
    assert (tmp_path / "new" / "deep").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        evaluate_localization(out=tmp_path / "file" / "r.json", **words)


def test_a_method_with_scores_of_its_own_can_be_named(birds, tmp_path):
    glsim.save(small_model("cal", classes=3), tmp_path / "cal", labels=["a", "b", "c"])
    words = dict(source=tmp_path / "cal", images=birds / "test", masks=birds / "masks", limit=2)
    own, named = (evaluate_localization(metrics=metrics, **words).targets for metrics in (None, ["cal"]))
    assert own == named and list(own["object"].rows) == ["cal"]


@pytest.mark.parametrize(
    ("words", "message"),
    [({"limit": 0}, "limit=0"), ({"resamples": 10}, "resamples=10: at least 100"), ({"metrics": ["x"]}, "metric 'x'")],
)
def test_settings_are_checked(words, message, source, birds):
    with pytest.raises(glsim.ConfigError, match=message):
        cli.localize.run(Options(source=source, images=str(birds / "test"), masks=str(birds / "masks"), **words), False)
