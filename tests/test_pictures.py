import numpy as np
import pytest
import torch
from conftest import small_model
from PIL import Image

import glsim
from glsim.config import Explain
from glsim.images import open_image
from glsim.pictures import run, to_heatmap


@pytest.mark.parametrize("method", ["glsim", "plain"])
def test_explanations_are_in_the_networks_view(method):
    model = small_model(method, size=(64, 96))
    images = torch.randn(2, 3, 64, 96)
    for metric in (None, "attention"):
        for e in glsim.explain(model, images, metric):
            assert e.image.shape == (64, 96, 3) and e.image.dtype == np.uint8
            assert e.heatmap.shape == (64, 96) and e.heatmap.min() >= 0 and e.heatmap.max() <= 1
            left, top, right, bottom = e.box
            assert 0 <= left < right <= 96 and 0 <= top < bottom <= 64
            assert e.label.startswith("class ") and 0 < e.probability <= 1


def test_the_models_own_metric_gives_its_own_box_and_crop():
    model = small_model()
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        output = model(images)
    for e, box in zip(glsim.explain(model, images), output.selection.boxes.tolist(), strict=True):
        assert list(e.box) == box
    (other,) = glsim.explain(model, images[:1], "gls_l2")
    assert other.image.shape == (64, 64, 3)
    with pytest.raises(glsim.ConfigError, match="unknown metric 'x'; choose from"):
        glsim.explain(model, images, "x")


def test_heatmap_is_bright_where_the_score_is_high():
    scores = torch.zeros(2, 16)
    scores[0, 6] = 3.0  # row 1, column 2
    maps = to_heatmap(scores, (4, 4), (64, 64))
    assert maps.shape == (2, 64, 64)
    row, col = divmod(int(maps[0].argmax()), 64)
    assert 16 <= row < 32 and 32 <= col < 48
    assert (maps[1] == 0).all()


def test_bad_images_stop_by_name_or_are_skipped(run_folder, birds, tmp_path):
    good = next((birds / "test").rglob("*.jpg"))
    (tmp_path / "bad.jpg").write_bytes(b"")
    words = {"source": str(run_folder), "images": [str(tmp_path / "bad.jpg"), str(good)], "out": str(tmp_path / "p")}
    with pytest.raises(glsim.DataError, match="bad.jpg: empty file"):
        run(Explain(**words))
    result = run(Explain(**words, skip_bad=True))
    assert len(result["pictures"]) == 1 and len(result["skipped"]) == 1


def test_photographs_are_never_overwritten(run_folder, birds, tmp_path):
    photo = tmp_path / "a.png"
    open_image(next((birds / "test").rglob("*.jpg"))).save(photo)
    before = photo.read_bytes()
    with pytest.raises(glsim.ConfigError, match=r"would overwrite the image .*a.png; name another folder"):
        run(Explain(source=str(run_folder), images=[str(photo)], out=str(tmp_path)))
    assert photo.read_bytes() == before


def test_names_are_no_formulas(run_folder, birds, tmp_path):
    odd = [tmp_path / "a$\\frac$b.png", tmp_path / "鳥.png"]
    for path in odd:
        open_image(next((birds / "test").rglob("*.jpg"))).save(path)
    result = run(Explain(source=str(run_folder), images=[str(p) for p in odd], out=str(tmp_path / "p")))
    assert len(result["pictures"]) == 2


def test_pictures_are_written_under_unique_names(run_folder, birds, tmp_path):
    folders = [str(birds / "test")]  # every class holds 0000.jpg, 0001.jpg, ..
    result = run(Explain(source=str(run_folder), images=folders, out=str(tmp_path / "p"), limit=5))
    assert len(result["pictures"]) == 5
    files = {p["picture"] for p in result["pictures"]}
    assert len(files) == 5
    for file in [*files, tmp_path / "p" / "sheet.png"]:
        with Image.open(file) as image:
            assert image.size[0] > 800
