import os

import numpy as np
import pytest
import torch
from conftest import choices, small_model
from PIL import Image

import glsim
from glsim.checkpoints.bundle import preprocessing_of
from glsim.cli.explain import Options
from glsim.cli.parser import parse
from glsim.data.images import open_image
from glsim.data.transforms import Preprocessing
from glsim.inference.predictor import to_original
from glsim.interpret.drawing import Page, overlay, title_of
from glsim.interpret.heatmaps import explanations, to_heatmap, to_photograph
from glsim.interpret.pictures import explain_images
from glsim.models import find_method
from glsim.models.base import Model
from glsim.models.boxes import select, select_component
from glsim.models.scores import NEEDS_ATTENTION, TITLES, score


def mark(monkeypatch, row, col):
    """A metric `mark` that is 1 at one patch of the grid and 0 elsewhere."""

    def metric(f):
        scores = torch.zeros(len(f.patches), 1, *f.grid)
        scores[..., row, col] = 1
        return scores.flatten(2)

    monkeypatch.setitem(glsim.METRICS, "mark", metric)


def random_bundle(folder, method="glsim", backbone="vit_tiny_patch16_224", **options):
    glsim.save(small_model(method, backbone, **options), folder)
    return str(folder)


@pytest.mark.parametrize("method", ["glsim", "plain"])
def test_explanations_are_in_the_networks_view(method):
    model = small_model(method, size=(64, 96))
    images = torch.randn(2, 3, 64, 96)
    for metric in (None, "attention"):
        for e in explanations(model, images, metric):
            assert e.metric == (metric or model.metric or "gls_cos")
            assert e.image.shape == (64, 96, 3) and e.image.dtype == np.uint8
            assert e.heatmap.shape == (64, 96) and e.heatmap.min() >= 0 and e.heatmap.max() <= 1
            left, top, right, bottom = e.box
            assert 0 <= left < right <= 96 and 0 <= top < bottom <= 64
            assert e.label.startswith("class ") and 0 < e.probability <= 1


def test_the_models_own_metric_gives_its_own_box_and_crop():
    model = small_model(crop_size=(32, 48))
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        output = model(images)
    for e, box in zip(explanations(model, images), output.selection.boxes.tolist(), strict=True):
        assert list(e.box) == box and e.crop.shape == (32, 48, 3)
    (other,) = explanations(model, images[:1], "gls_l2")
    assert other.image.shape == (64, 64, 3)


@pytest.mark.parametrize("method", glsim.METHODS)
def test_every_method_and_metric(method):
    options = {"glsim": {"metric": "gls_l1"}, "cal": {"maps": 4, "views": 2}}
    model, images = small_model(method, **options.get(method, {})), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        selection = model(images).selection
    own = model.metric or ("gls_cos" if selection is None else method)
    assert [e.metric for e in explanations(model, images)] == [own] * 2
    for metric in (None, own, *glsim.METRICS):
        maps = glsim.explain(model, images, metric)
        assert maps.shape == (2, 64, 64) and maps.dtype == np.float32
        assert maps.min() >= 0 and maps.max() <= 1 and maps.max() > 0.5
    if selection is not None:
        expected = to_heatmap(selection.scores, selection.grid, (64, 64)).numpy()
        assert np.allclose(glsim.explain(model, images), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["rams", "aftrans"])
def test_another_metric_goes_by_the_models_rule(method):
    model, images = small_model(method, threshold=1.01), torch.randn(2, 3, 64, 64)
    f = model.features(images)
    selection = select_component(glsim.METRICS["gls_l2"](f), 1.01, f.grid, (64, 64))
    assert [list(e.box) for e in explanations(model, images, "gls_l2")] == selection.boxes.tolist()
    model = small_model(top_o=2, box="inclusive")
    f = model.features(images)
    selection = select(glsim.METRICS["gls_l2"](f), 2, f.grid, (64, 64), "inclusive")
    assert [list(e.box) for e in explanations(model, images, "gls_l2")] == selection.boxes.tolist()


@pytest.mark.parametrize("method", glsim.METHODS)
def test_a_rule_by_scores_is_the_one_that_the_method_chooses_by(method):
    """A method without one is drawn by its eight best patches."""
    model, images = small_model(method), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        chosen = model(images).selection
        scores = score(model.metric or "gls_cos", model.features(images, attention=True))
        drawn = model.select(scores, images)
    if type(model).select is Model.select:
        assert torch.equal(drawn.indices, scores.mean(dim=1).topk(8).indices)
        return
    assert torch.equal(drawn.boxes, chosen.boxes) and torch.equal(drawn.indices, chosen.indices)
    assert drawn.grid == chosen.grid == model.backbone.grid
    torch.testing.assert_close(drawn.scores, chosen.scores)


METHOD_WITH_A_RULE = """
from glsim.models.base import Model
from glsim.models.boxes import select_these
from glsim.models.heads import zero_linear
from glsim.types import Output

TITLE = "Worst patch"
EMBEDDINGS = ("global",)


class Worst(Model):
    def __init__(self, backbone, head, metric):
        super().__init__()
        self.backbone, self.head, self.metric = backbone, head, metric

    def forward(self, images):
        f = self.features(images)
        selection = self.select(-(f.patches - f.cls[:, None]).norm(dim=-1)[:, None], images)
        return Output(self.head(f.cls), selection, embeddings={"global": f.cls})

    def select(self, scores, images):
        worst = scores.mean(dim=1).argmin(dim=1, keepdim=True)
        return select_these(scores.mean(dim=1), worst, self.backbone.grid_of(images), images.shape[-2:])


def build(encoder, num_classes, *, metric=None):
    return Worst(encoder, zero_linear(encoder.dim, num_classes), metric)
"""


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "resnet18"])
def test_a_method_with_a_rule_of_its_own_is_drawn_by_it(backbone, tmp_path, monkeypatch):
    (tmp_path / "worst_patch.py").write_text(METHOD_WITH_A_RULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(glsim.METHODS, "worst", "worst_patch")
    mark(monkeypatch, row=1, col=1)
    monkeypatch.setitem(glsim.METRICS, "hole", lambda f: -glsim.METRICS["mark"](f))
    assert find_method("worst").embeddings == ("global",) and not find_method("worst").crops
    assert title_of("worst") == "Worst patch" and title_of("hole") == "hole"

    model = small_model("worst", backbone, size=(64, 96))
    rows, cols = model.backbone.grid
    height, width = 64 // rows, 96 // cols
    images = torch.randn(2, 3, 64, 96)
    for e in explanations(model, images, "hole"):
        assert e.metric == "hole" and e.box == (width, height, 2 * width, 2 * height)
    with torch.inference_mode():
        own = model(images).selection.boxes.tolist()
    assert [(e.metric, list(e.box)) for e in explanations(model, images)] == [("worst", box) for box in own]

    Image.effect_noise((60, 50), 90).convert("RGB").save(tmp_path / "a.png")
    source = glsim.save(model, tmp_path / "m")
    (picture,) = explain_images(source, [tmp_path / "a.png"], tmp_path / "p", metrics=["worst", "hole"]).pictures
    assert picture.boxes["hole"] == [width, height, 2 * width, 2 * height] and list(picture.boxes) == ["worst", "hole"]


def test_every_metric_and_every_method_has_a_title():
    assert set(TITLES) == set(glsim.METRICS)
    assert title_of("psm") == "PSM" and title_of("rollout:first=2,last=8") == "Rollout (first=2, last=8)"
    assert title_of("cal") == "CAL" and title_of("plain") == "plain"


def test_a_convolutional_network_takes_what_needs_no_attention(tmp_path):
    torch.manual_seed(0)
    model, images = glsim.create_model("plain", "resnet18", 5, 64).eval(), torch.randn(1, 3, 64, 64)
    free = [name for name in glsim.METRICS if name not in NEEDS_ATTENTION]
    for metric in free:
        assert glsim.explain(model, images, metric).shape == (1, 64, 64)
    with pytest.raises(glsim.ConfigError, match=f"'psm' reads attention maps.*{choices(free)}$"):
        glsim.explain(model, images, "psm")
    glsim.save(model, tmp_path / "m")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    words = {"source": str(tmp_path / "m"), "images": [str(tmp_path / "a.png")], "out": str(tmp_path / "p")}
    assert explain_images(**words, metrics=["all"]).metrics == free


@pytest.mark.parametrize("metric", ["x", "all", "glsim"])
def test_unknown_metrics_are_refused(metric):
    model = small_model()
    for function in (glsim.explain, explanations):
        with pytest.raises(glsim.ConfigError, match=f"unknown metric '{metric}'; {choices(glsim.METRICS)}$"):
            function(model, torch.randn(1, 3, 64, 64), metric)


def test_parameters_of_a_metric_count():
    model, images = small_model(), torch.randn(1, 3, 64, 64)
    first, last = (glsim.explain(model, images, f"attention:block={b}") for b in (0, 1))
    assert not np.allclose(first, last)
    assert np.array_equal(last, glsim.explain(model, images, "attention"))


@pytest.mark.parametrize("size", [(300, 120), (90, 200), (33, 20)])
def test_a_map_lies_where_the_patch_was_in_the_photograph(monkeypatch, size):
    mark(monkeypatch, row=1, col=3)
    model = small_model(size=(64, 96))
    p = preprocessing_of(model)
    (found,) = glsim.explain(model, Image.new("RGB", size), "mark")
    assert found.shape == (size[1], size[0]) and found.dtype == np.float32
    assert found.min() == 0 and 0.9 < found.max() <= 1
    left, top, right, bottom = to_original((48, 16, 64, 32), size, p)
    rows, cols = np.nonzero(found > 0.8 * found.max())
    assert top <= rows.min() and rows.max() < bottom and left <= cols.min() and cols.max() < right
    assert abs(rows.mean() + 0.5 - (top + bottom) / 2) <= 1 and abs(cols.mean() + 0.5 - (left + right) / 2) <= 1


def test_edges_that_the_network_is_not_shown_are_zero():
    p = Preprocessing((64, 96), 2.0, (0.5,) * 3, (0.5,) * 3)
    found = to_photograph(np.ones((64, 96), np.float32), (400, 200), p)
    assert found.shape == (200, 400)
    assert (found[55:145, 105:295] == 1).all()
    assert (found[:45] == 0).all() and (found[155:] == 0).all()
    assert (found[:, :95] == 0).all() and (found[:, 305:] == 0).all()


def test_paths_and_pil_images_one_or_several(tmp_path):
    model = small_model()
    photo = Image.effect_noise((50, 30), 80).convert("RGB")
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # shown turned by 90 degrees to the right
    photo.save(tmp_path / "a.png")
    turned.save(tmp_path / "b.png", exif=exif)
    (one,) = glsim.explain(model, str(tmp_path / "a.png"))
    with Image.open(tmp_path / "b.png") as opened:
        several = glsim.explain(model, [tmp_path / "a.png", photo, tmp_path / "b.png", opened])
    assert len(several) == 4
    for found in several:
        assert found.shape == (30, 50) and found == pytest.approx(one, abs=1e-5)
    with pytest.raises(glsim.DataError, match=r"none\.png"):
        glsim.explain(model, tmp_path / "none.png")


def test_heatmap_is_bright_where_the_score_is_high():
    scores = torch.zeros(2, 16)
    scores[0, 6] = 3.0  # row 1, column 2
    maps = to_heatmap(scores, (4, 4), (64, 64))
    assert maps.shape == (2, 64, 64)
    row, col = divmod(int(maps[0].argmax()), 64)
    assert 16 <= row < 32 and 32 <= col < 48
    assert (maps[1] == 0).all()


def test_top_o_keeps_exactly_the_best_patches():
    torch.manual_seed(0)
    scores = torch.rand(2, 20) + 1
    scores[1] = -scores[1]
    whole = to_heatmap(scores, (4, 5), (4, 5)).flatten(1)
    best = to_heatmap(scores, (4, 5), (4, 5), top_o=3).flatten(1)
    for row in range(2):
        kept = scores[row].topk(3).indices
        assert set(best[row].nonzero().flatten().tolist()) == set(kept.tolist())
        assert torch.equal(best[row, kept], whole[row, kept])
    model, images = small_model(), torch.randn(1, 3, 64, 64)
    assert glsim.explain(model, images, top_o=16) == pytest.approx(glsim.explain(model, images), abs=1e-5)
    assert glsim.explain(model, images, top_o=2).mean() < glsim.explain(model, images).mean()
    with pytest.raises(glsim.ConfigError, match="top_o=17, but the grid of the backbone has 16 patches"):
        glsim.explain(model, images, top_o=17)


def test_power_is_an_exponent():
    model, images = small_model(), torch.randn(2, 3, 64, 64)
    assert np.allclose(glsim.explain(model, images, power=3), glsim.explain(model, images) ** 3, atol=1e-6)
    for power in (0, -1, float("nan")):
        with pytest.raises(glsim.ConfigError, match=f"power={power}: above 0"):
            glsim.explain(model, images, power=power)


def test_overlay_blends_by_alpha():
    image, heat = np.full((8, 6, 3), 200, np.uint8), np.zeros((4, 3), np.float32)
    heat[0] = 1
    assert np.array_equal(overlay(image, heat, alpha=0), image)
    full = overlay(image, heat, alpha=1, colormap="gray")
    assert (full[0] == 255).all()  # white where the map is 1
    assert (full[-1] == 120).all()  # black at four tenths where it is 0
    assert (overlay(image, heat, alpha=0.5, colormap="gray")[-1] == 160).all()
    with pytest.raises(glsim.ConfigError, match="unknown colormap 'x'; try turbo"):
        overlay(image, heat, colormap="x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5: from 0 to 1"),
        ({"power": 0.0}, "power=0.0: above 0"),
        ({"top_only": -1}, "top_only=-1: at least 0"),
        ({"top_only": 17}, "top_only=17, but the grid of the backbone has 16 patches"),
        ({"colormap": "x"}, "unknown colormap 'x'; try turbo"),
        ({"metrics": ["gls_cos", "x"]}, "unknown metric 'x'; choose from"),
        ({"metrics": ["attention:head=1"]}, "'attention' has no head; it has: block"),
    ],
)
def test_options_are_checked(words, message, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    source = random_bundle(tmp_path / "m")
    with pytest.raises(glsim.ConfigError, match=message):
        settings = Options(source=source, images=[str(tmp_path / "a.png")], out=str(tmp_path / "p"), **words)
        explain_images(**vars(settings))
    assert not (tmp_path / "p").exists()


def test_metrics_on_the_command_line():
    words = ["m", "a.png", "b.png", "--metrics", "psm", "rollout:first=2,last=8", "--out", "p"]
    settings = parse("explain", Options, words)
    assert settings.images == ["a.png", "b.png"] and settings.metrics == ["psm", "rollout:first=2,last=8"]
    assert parse("explain", Options, ["m", "a", "--out", "p", "--metrics", "all"]).metrics == ["all"]
    assert parse("explain", Options, ["m", "a", "--out", "p"]).metrics is None


def test_all_metrics_are_drawn(tmp_path):
    for i, size in enumerate([(80, 50), (40, 70)]):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{i}.png")
    images = [str(tmp_path / f"{i}.png") for i in range(2)]
    source = random_bundle(tmp_path / "m", metric="psm")
    result = explain_images(source, images, tmp_path / "p", metrics=["all", "attention:block=0"])
    assert result.metrics == ["psm", *(m for m in glsim.METRICS if m != "psm"), "attention:block=0"]
    assert result.sheet == str(tmp_path / "p" / "sheet.png")
    model = glsim.load(source)
    for picture in result.pictures:
        assert list(picture.boxes) == result.metrics and picture.box is None
        (answer,) = glsim.Predictor(model)(picture.path)
        assert picture.probability == pytest.approx(answer.probabilities[0], abs=1e-5)
    columns = len(result.metrics)
    for file, wide, high in ((result.pictures[0].picture, columns + 3, 3), (result.sheet, columns + 1, 2)):
        with Image.open(file) as image:
            assert 2000 < image.width <= 4000
            assert 0.75 < (image.width / wide) / (image.height / high) < 1.2  # square cells, and lines of words


def test_what_is_drawn_follows_the_options(tmp_path):
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "a.png")
    source, seen = random_bundle(tmp_path / "m"), set()
    for words in ({}, {"alpha": 0.2}, {"colormap": "gray"}, {"top_only": 2}, {"power": 3.0}, {"metrics": ["gls_l1"]}):
        result = explain_images(source, [tmp_path / "a.png"], tmp_path / "p", **words)
        assert result.sheet is None
        with Image.open(result.pictures[0].picture) as image:
            seen.add(image.tobytes())
    assert len(seen) == 6


def test_words_stay_in_their_room():
    page = Page(400, 50)
    for text in ("short", "a little too long", "much too long for any room, even where it is written small"):
        assert page.words(text, 0, 30, 120, 18) <= 120
        shown = page.axes.texts[-1]
        assert (shown.get_text() == text) == (not text.startswith("much"))
        assert (shown.get_fontsize() == 18) == (text == "short")


def test_bad_images_stop_by_name_or_are_skipped(run_folder, birds, tmp_path):
    good = next((birds / "test").rglob("*.jpg"))
    (tmp_path / "bad.jpg").write_bytes(b"")
    words = {"source": str(run_folder), "images": [str(tmp_path / "bad.jpg"), str(good)], "out": str(tmp_path / "p")}
    with pytest.raises(glsim.DataError, match="bad.jpg: empty file"):
        explain_images(**words)
    result = explain_images(**words, skip_bad=True)
    assert len(result.pictures) == 1 and len(result.skipped) == 1 and result.sheet is None


def test_photographs_are_never_overwritten(run_folder, birds, tmp_path):
    photo = tmp_path / "a.png"
    open_image(next((birds / "test").rglob("*.jpg"))).save(photo)
    before = photo.read_bytes()
    with pytest.raises(glsim.ConfigError, match=r"would overwrite the image .*a.png; name another folder"):
        explain_images(run_folder, [photo], tmp_path)
    assert photo.read_bytes() == before


@pytest.mark.parametrize("metrics", [None, ["gls_cos", "random"]])
def test_names_are_no_formulas(run_folder, birds, tmp_path, metrics):
    odd = [tmp_path / "a$\\frac$b.png", tmp_path / "鳥.png"]
    for path in odd:
        open_image(next((birds / "test").rglob("*.jpg"))).save(path)
    words = {"images": [str(p) for p in odd], "out": str(tmp_path / "p"), "metrics": metrics}
    assert len(explain_images(run_folder, **words).pictures) == 2


def test_pictures_are_written_under_unique_names(run_folder, birds, tmp_path):
    folders = [str(birds / "test")]  # every class holds 0000.jpg, 0001.jpg, ..
    result = explain_images(run_folder, folders, tmp_path / "p", limit=5)
    assert len(result.pictures) == 5 and result.metrics == ["gls_border"]
    files = {p.picture for p in result.pictures}
    assert len(files) == 5
    for file in [*files, tmp_path / "p" / "sheet.png"]:
        with Image.open(file) as image:
            assert image.size[0] > 800


def test_names_that_are_no_text_are_drawn_escaped(tmp_path):
    """A file name that is no UTF-8, a label with half of a character."""
    glsim.save(small_model(), tmp_path / "m", ["\ud800x", "\x1b[2J", "c", "d", "e"])
    for name in (b"\xff\xfe.png", b"b\nc.png"):
        Image.effect_noise((64, 64), 90).convert("RGB").save(os.path.join(os.fsencode(tmp_path), name))
    images = [str(path) for path in tmp_path.glob("*.png")]
    assert len(explain_images(tmp_path / "m", images, tmp_path / "p").pictures) == 2
