"""Masks of every kind: found beside their images, read by what they hold, and taken the way of their images."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write
from PIL import Image

import glsim
from glsim.data.masks import find_masks, read_mask, to_view
from glsim.data.transforms import Preprocessing

VOC = "<object><name>dog</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def png(path, values, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).convert(mode).save(path)
    return path


def voc(path, *boxes, size=(40, 30)):
    told = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return write(path, "<annotation>", told, *(VOC.format(*box) for box in boxes), "</annotation>")


def test_masks_are_read_by_what_they_hold(tmp_path):
    values = np.zeros((30, 40))
    values[5:10, 8:20] = 7
    for mode in ("L", "LA", "RGB", "RGBA", "P"):
        levels = np.asarray(read_mask(png(tmp_path / f"{mode}.png", values, mode), (40, 30)))
        assert np.array_equal(levels == 255, values > 0) and set(np.unique(levels)) == {0, 255}
    for colours in (1, 3):  # cut out: what is around is transparent, whatever its colour
        cut = np.dstack([np.full((30, 40, colours), 200), values.clip(max=1)]).astype(np.uint8)
        Image.fromarray(cut).save(tmp_path / "cut.png")
        assert np.array_equal(np.asarray(read_mask(tmp_path / "cut.png", (40, 30))) == 255, values > 0)
    trimap = np.full((30, 40), 2)
    trimap[4:11, 7:21], trimap[5:10, 8:20] = 3, 1
    levels = np.asarray(read_mask(png(tmp_path / "t.png", trimap), (40, 30)))
    for value, level in ((1, 255), (2, 0), (3, 128)):
        assert np.array_equal(levels == level, trimap == value)
    near = np.where(trimap == 2, 3, trimap)  # a picture that the object and its border fill
    levels = np.asarray(read_mask(png(tmp_path / "n.png", near), (40, 30)))
    assert np.array_equal(levels == 255, near == 1) and np.array_equal(levels == 128, near == 3)
    for value, mode in ((1, "L"), (255, "1")):
        full = png(tmp_path / "o.png", np.full((30, 40), value), mode)
        assert (np.asarray(read_mask(full, (40, 30))) == 255).all()
    labels = trimap.copy()
    labels[0, 0] = 0  # no trimap: it has a background of its own
    assert (np.asarray(read_mask(png(tmp_path / "l.png", labels), (40, 30))) == 255).sum() == 30 * 40 - 1
    as_it_is = Preprocessing((30, 40), 1.0, (0.5,) * 3, (0.5,) * 3)
    boxes = to_view(read_mask(voc(tmp_path / "v.xml", (9, 6, 20, 10), (40, 30, 40, 30)), (40, 30)), as_it_is)
    expected = values > 0
    expected[29, 39] = True
    assert np.array_equal(boxes[0], expected) and boxes[1].all()
    for encoding in ("ISO-8859-1", "UTF-16"):
        text = f'<?xml version="1.0" encoding="{encoding}"?>' + (tmp_path / "v.xml").read_text().replace("dog", "Dächs")
        (tmp_path / "e.xml").write_bytes(text.encode(encoding))
        assert np.array_equal(to_view(read_mask(tmp_path / "e.xml", (40, 30)), as_it_is)[0], expected)
    beyond = read_mask(voc(tmp_path / "b.xml", (-7, 6, "1e30", 10)), (40, 30))
    expected = np.zeros((30, 40), bool)
    expected[5:10] = True
    assert np.array_equal(to_view(beyond, as_it_is)[0], expected)


def test_bad_masks_are_named(tmp_path):
    size = (40, 30)
    cases = [
        (png(tmp_path / "empty.png", np.zeros((30, 40))), "empty.png: an empty mask"),
        (png(tmp_path / "small.png", np.ones((30, 41))), "small.png is of 41 x 30 pixels, its image of 40 x 30"),
        (write(tmp_path / "text.png", "no picture"), "text.png: no readable PNG"),
        (write(tmp_path / "cut.xml", "<annotation>"), "cut.xml: no boxes in the format of PASCAL VOC"),
        (voc(tmp_path / "none.xml"), "none.xml: no bndbox in it"),
        (write(tmp_path / "page.xml", "<html/>"), "page.xml: no bndbox in it"),
        (write(tmp_path / "code.xml", '<?xml version="1.0" encoding="nine"?><a/>'), "code.xml: no boxes in the format"),
        (voc(tmp_path / "inf.xml", (1, 1, "inf", 9)), "inf.xml: no boxes in the format of PASCAL VOC .*infinity"),
        (voc(tmp_path / "huge.xml", (1, 1, "1e400", 9)), "huge.xml: no boxes in the format of PASCAL VOC .*infinity"),
        (voc(tmp_path / "swapped.xml", (20, 10, 9, 6)), "swapped.xml: box 20,10,9,6 is empty or turned round"),
        (voc(tmp_path / "off.xml", (50, 5, 60, 9)), "off.xml: box 50,5,60,9 lies outside of 40 x 30"),
        (voc(tmp_path / "turned.xml", (1, 1, 5, 5), size=(30, 40)), "turned.xml is of 30 x 40 pixels"),
    ]
    whole = png(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (30, 40))).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for file, said in [*cases, (tmp_path / "half.png", "half.png: no readable PNG")]:
        with pytest.raises(glsim.DataError, match=said):
            read_mask(file, size)


def test_masks_are_found_where_the_images_are(tmp_path, birds):
    found = find_masks(birds / "test", birds / "masks")
    assert len(found) == 9 and all(set(image.masks) == {"object", "part"} for image in found)
    for image in found:
        below = image.path.relative_to(birds).with_suffix(".png")
        assert image.masks == {"object": birds / "masks" / "body" / below, "part": birds / "masks" / "part" / below}
    assert len(find_masks(birds, birds / "masks")) == 27  # the masks are no images
    assert find_masks(birds / "test", birds / "masks" / "part")[0].masks["object"] == found[0].masks["part"]
    flat = tmp_path / "flat"
    png(tmp_path / "images" / "x_1.png", np.ones((3, 4)))
    with pytest.raises(glsim.DataError, match=r"masks=.*flat is no folder"):
        find_masks(tmp_path / "images", flat)
    flat.mkdir()
    with pytest.raises(glsim.DataError, match=r"x_1.png has no mask in .*flat; wanted .*x_1.png or .*x_1.xml"):
        find_masks(tmp_path / "images", flat)
    mask = png(flat / "x_1.png", np.ones((3, 4)))
    assert [image.masks for image in find_masks(tmp_path / "images", flat)] == [{"object": mask}]
    for ending in ("PNG", "xml", "XML"):
        mask = mask.rename(mask.with_suffix(f".{ending}"))
        assert [image.masks for image in find_masks(tmp_path / "images", flat)] == [{"object": mask}]
    png(tmp_path / "images" / "a" / "x_1.png", np.ones((3, 4)))
    with pytest.raises(glsim.DataError, match="put masks in folders as the images"):
        find_masks(tmp_path / "images", flat)


def test_masks_of_globs_files_and_beside_the_images(tmp_path, birds, monkeypatch):
    every = find_masks(birds / "test", birds / "masks")
    for given in ("test/*/*.jpg", "test/**/*.jpg", "te*/*/*.jpg"):
        assert find_masks(birds / given, birds / "masks") == every
    for image in every[:2]:
        assert find_masks(image.path, birds / "masks") == [image]
    monkeypatch.chdir(birds / "test")
    assert [image.masks for image in find_masks(".", "../masks")] == [
        {target: Path("../masks") / file.relative_to(birds / "masks") for target, file in image.masks.items()}
        for image in every
    ]
    for name in ("a/x.jpg", "a/y.png"):
        png(tmp_path / "voc" / name, np.zeros((30, 40)))
        voc((tmp_path / "voc" / name).with_suffix(".xml"), (1, 1, 5, 5))
    png(tmp_path / "voc" / "a" / "z.jpg", np.zeros((30, 40)))
    png(tmp_path / "voc" / "a" / "z.png", np.ones((30, 40)))  # no image: no XML beside it
    found = find_masks(tmp_path / "voc", tmp_path / "voc")
    names = [(i.path.name, i.masks["object"].name) for i in found]
    assert names == [("x.jpg", "x.xml"), ("y.png", "y.xml"), ("z.jpg", "z.png")]
    monkeypatch.chdir(tmp_path / "voc")
    own = png(tmp_path / "m" / "z.png", np.ones((30, 40)))
    (image,) = find_masks("../voc/a/z.jpg", tmp_path / "m")  # not m/../voc/a/z.png
    assert image.masks == {"object": own}


@pytest.mark.parametrize("rule", ["square", "short"])
def test_a_mask_goes_the_way_of_its_image(rule):
    p = Preprocessing((64, 96), 1.25, (0.5,) * 3, (0.5,) * 3, rule)
    levels = np.zeros((150, 260), np.uint8)
    levels[40:90, 100:180], levels[90:100, 100:180] = 255, 128
    inside, counted = to_view(Image.fromarray(levels), p)
    assert inside.shape == counted.shape == (64, 96) and not (inside & ~counted).any()
    height, width = p.resized((260, 150))
    for shown, (top, bottom) in ((inside, (40, 90)), (~counted, (90, 100))):
        rows, cols = shown.nonzero(as_tuple=True)
        scale, shift = (height / 150, width / 260), ((height - 64) / 2, (width - 96) / 2)
        assert abs(rows.min() - (top * scale[0] - shift[0])) <= 1.5
        assert abs(rows.max() + 1 - (bottom * scale[0] - shift[0])) <= 1.5
        assert abs(cols.min() - (100 * scale[1] - shift[1])) <= 1.5
        assert abs(cols.max() + 1 - (180 * scale[1] - shift[1])) <= 1.5
