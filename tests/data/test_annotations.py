"""Boxes and points: every format to the same numbers, held against their images, taken the way of their images."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, write
from PIL import Image, ImageDraw

import glsim
from glsim.data import publishers
from glsim.data.annotations import Annotation, Mark, fit, read_annotations, read_voc
from glsim.data.masks import check_masks, find_annotated, points_to_view, to_view
from glsim.data.transforms import Preprocessing

SIZE = 40, 30
BOXES = {"a/x": [(8, 5, 20, 10), (30, 2, 40, 30)], "b/y": [(0, 0, 7, 9)]}
POINTS = {"a/x": [("beak", 9, 6, True), ("tail", 39, 29, True), ("eye", 10, 7, False)], "b/y": [("beak", 3, 4, True)]}
VOC = "<object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def lines_of(rows):
    return [",".join(map(str, row)) for row in rows]


def write_csv(top):
    boxes = [(f"{key}.jpg", *box) for key, given in BOXES.items() for box in given]
    points = [(f"{key}.jpg", name, x, y, int(seen)) for key, given in POINTS.items() for name, x, y, seen in given]
    files = write(top / "boxes.csv", "path,left,top,right,bottom", *lines_of(boxes))
    return files, write(top / "parts.csv", "path,part,x,y,visible", *lines_of(points))


def write_voc(top):
    size = "<size><width>40</width><height>30</height></size>"
    for key, given in BOXES.items():
        boxes = [VOC.format(left + 1, upper + 1, right, lower) for left, upper, right, lower in given]
        write(top / "voc" / f"{key}.xml", "<annotation>", size, *boxes, "</annotation>")
    return top / "voc", None


def coco_of():
    names = ["beak", "eye", "tail"]
    images = [{"id": i, "file_name": f"{key}.jpg", "width": 40, "height": 30} for i, key in enumerate(BOXES)]
    marks = []
    for i, (key, given) in enumerate(BOXES.items()):
        for n, (left, top, right, bottom) in enumerate(given):
            mark = {"image_id": i, "category_id": 7, "bbox": [left, top, right - left, bottom - top]}
            if n == 0:
                placed = {name: [x, y, 1 + seen] for name, x, y, seen in POINTS[key]}
                mark["keypoints"] = [value for name in names for value in placed.get(name, [0, 0, 0])]
            marks.append(mark)
    return {"images": images, "categories": [{"id": 7, "keypoints": names}], "annotations": marks}


def write_coco(top):
    return write(top / "coco.json", json.dumps(coco_of())), None


def write_cub(top, sizes=True):
    top = top / "CUB_200_2011"
    keys = {key: i + 1 for i, key in enumerate(BOXES)}
    boxes = [(keys[k], b[0], b[1], b[2] - b[0], b[3] - b[1]) for k, given in BOXES.items() for b in given]
    parts = {"beak": 1, "left eye": 2, "tail": 3}
    points = [
        (keys[key], parts["left eye" if name == "eye" else name], x, y, int(seen))
        for key, given in POINTS.items()
        for name, x, y, seen in given
    ]
    tables = {
        "images": [(i, f"{key}.jpg") for key, i in keys.items()],
        "bounding_boxes": boxes,
        "parts/parts": [(i, name) for name, i in parts.items()],
        "parts/part_locs": points,
    }
    if sizes:
        tables["sizes"] = [(i, 40, 30) for i in keys.values()]
    for name, rows in tables.items():
        write(top / f"{name}.txt", *(" ".join(map(str, row)) for row in rows))
    return top.parent, None


FORMATS = {"csv": write_csv, "voc": write_voc, "coco": write_coco, "cub": write_cub}


def pictures(top, size=SIZE, names=("a/x.jpg", "b/y.png")):
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(top / name)
    return top


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_says_the_same(kind, tmp_path):
    images = pictures(tmp_path / "images")
    boxes, points = FORMATS[kind](tmp_path / "lists")
    found = find_annotated(images, None, boxes, points)
    assert not any(found.without.values()) and not any(found.unused.values())
    sound, bad = check_masks(found.images)
    assert not bad and [image.path.name for image in sound] == ["x.jpg", "y.png"]
    for image, key in zip(sound, BOXES, strict=True):
        assert [mark.sides for mark in image.masks["box"].boxes] == BOXES[key] and image.masks["box"].size == SIZE
        if kind == "voc":
            assert image.points is None
        else:
            expected = {(name, 0): (x, y) for name, x, y, seen in POINTS[key] if seen}
            assert image.points.visible() == expected


def test_images_and_lists_that_do_not_meet_are_counted(tmp_path):
    images = pictures(tmp_path / "images", names=("a/x.jpg", "c/x.jpg", "z.jpg"))
    boxes = write(tmp_path / "boxes.csv", "path,left,top,right,bottom", "a\\x.webp,1,1,5,5", "q.jpg,1,1,5,5")
    parts = write(tmp_path / "parts.csv", "path,part,x,y", "z.jpg,beak,3,3", "a/x.jpg,beak,3,3")
    found = find_annotated(images, None, boxes, parts)
    assert [image.path for image in found.images] == [images / "a/x.jpg"]
    assert found.without == {
        "boxes": [str(images / "c/x.jpg"), str(images / "z.jpg")],
        "points": [str(images / "c/x.jpg")],
    }
    assert found.unused == {"boxes": 1, "points": 0}
    write(boxes, "path,left,top,right,bottom", "x.jpg,1,1,5,5")
    with pytest.raises(glsim.DataError, match=r"boxes.csv: x.jpg is .*a/x.jpg and .*c/x.jpg; list images with"):
        find_annotated(images, None, boxes, None)
    write(boxes, "path,left,top,right,bottom", "d/z.jpg,1,1,5,5")  # another folder's: not by the name alone
    with pytest.raises(glsim.DataError, match=r"no boxes of any of the 3 images: none .*a/x.jpg, ends .* as d/z.jpg"):
        find_annotated(images, None, boxes, None)
    with pytest.raises(glsim.DataError, match=r"parts.csv: no boxes of any of the 3 images"):
        find_annotated(images, None, parts, None)
    write(boxes, "path,left,top,right,bottom", "x.jpg,1,1,5,5", "x.png,1,1,5,5")
    pictures(images, names=("x.jpg", "x.png"))
    both = find_annotated(images / "x.*", None, boxes, None)
    assert [image.masks["box"].where for image in both.images] == [f"{boxes}: x.jpg", f"{boxes}: x.png"]


def test_masks_and_boxes_are_targets_beside_each_other(birds, tmp_path):
    path = next((birds / "test").rglob("*.jpg"))
    boxes = write(tmp_path / "boxes.csv", "path,left,top,right,bottom", f"{path.relative_to(birds)},1,1,5,5")
    (image,) = find_annotated(birds / "test", birds / "masks", boxes, None).images
    assert image.path == path and list(image.masks) == ["object", "part", "box"]


def bad_coco(**changes):
    content = coco_of()
    content["annotations"][1] |= changes
    return json.dumps({**content, **({} if changes else {"images": 3})})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("b.csv", "path,left,top,right,bottom\na,1,2,x,4", r"b.csv, line 2: wanted the numbers left,.* got \['1', '2'"),
        ("b.csv", "path,left,top,right,bottom\na,1,2,nan,4", "b.csv, line 2: wanted the numbers"),
        ("b.csv", "path,left,top,right,bottom\n\na,1,2,3", "b.csv, line 3: empty bottom"),
        ("b.csv", "path,part,x,y\na,,2,3", "b.csv, line 2: empty part"),
        ("b.csv", "path,left,top,right,bottom,width,height\na,1,2,3,4,0,5", "line 2: 0 x 5 is no size"),
        ("b.csv", "path,left,top,right,bottom,width,height\na,1,2,3,4,9,\n", "line 2: wanted the numbers width,height"),
        (
            "b.csv",
            "path,left,top,right,bottom,width,height\na,1,2,3,4,9,9\na,1,2,3,4,8,9",
            r"line 3: .*: \(8, 9\) for width and height, but \(9, 9\) before",
        ),
        ("b.csv", "path,xmin\na,1", "the first line must name the columns path,left,top,right,bottom or path,part,x,y"),
        ("b.csv", "path,left,top,right,bottom", "b.csv: no annotation in it; wanted a CSV file"),
        ("c.json", "{", "c.json is damaged"),
        ("c.json", "{}", r"c.json: not as COCO has images and annotations \(KeyError: 'images'\)"),
        ("c.json", bad_coco(), "c.json: not as COCO has images and annotations"),
        ("c.json", bad_coco(bbox=[1, 2, 3]), r"c.json, annotations\[1\]: wanted the numbers x,y,width,height, got"),
        ("c.json", bad_coco(bbox=None), r"c.json, annotations\[1\]: wanted the numbers"),
        ("c.json", bad_coco(image_id=99), r"c.json, annotations\[1\]: not as COCO .*99"),
        ("c.json", bad_coco(keypoints=[1, 2]), r"annotations\[1\]: 2 numbers for 3 keypoints of 3 each"),
    ],
)
def test_bad_lines_are_named(name, text, said, tmp_path):
    with pytest.raises(glsim.DataError, match=said):
        read_annotations(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("bounding_boxes", "1 2 3", "bounding_boxes.txt, line 2: 5 values are needed, got '1 2 3'"),
        ("bounding_boxes", "1 2 3 4 x", "bounding_boxes.txt, line 2: wanted the numbers x,y,width,height"),
        ("bounding_boxes", "9 2 3 4 5", "bounding_boxes.txt, line 2: 9 is not in images.txt"),
        ("parts/part_locs", "1 9 3 4 1", r"part_locs.txt, line 2: .* the part 9 not in parts/parts.txt"),
        ("sizes", "1 0 0", "sizes.txt, line 2: 0 x 0 is no size"),
    ],
)
def test_bad_lines_of_cub_are_named(name, line, said, tmp_path):
    top, _ = write_cub(tmp_path)
    file = top / "CUB_200_2011" / f"{name}.txt"
    first = file.read_text().splitlines()[0]
    write(file, first, line)
    with pytest.raises(glsim.DataError, match=said):
        read_annotations(top)


def test_a_folder_of_nothing_is_said(tmp_path):
    with pytest.raises(glsim.DataError, match="no annotation in this folder; wanted a CSV file"):
        read_annotations(tmp_path)
    with pytest.raises(glsim.DataError, match=r"gone.csv: not readable .*; wanted a CSV file"):
        read_annotations(tmp_path / "gone.csv")


def test_xml_declares_no_entities_and_is_no_larger_than_such_a_file(tmp_path, monkeypatch):
    bomb = '<!DOCTYPE a [<!ENTITY b "1"><!ENTITY c "&b;&b;&b;">]>'
    box = VOC.format("&c;", 1, 400, 9)
    for encoding in ("utf-8", "utf-16"):
        file = tmp_path / "x.xml"
        text = f'<?xml version="1.0" encoding="{encoding}"?>{bomb}<a>{box}</a>'
        file.write_bytes(text.encode(encoding))
        with pytest.raises(glsim.DataError, match="x.xml: no boxes in the format of PASCAL VOC .*has a DOCTYPE"):
            read_voc(file)
    file = write(tmp_path / "y.xml", "<a>", VOC.format(1, 1, 4, 9), "</a>")
    assert read_voc(file).boxes[0].sides == (0, 0, 4, 9)
    monkeypatch.setattr(publishers, "LARGEST_XML", 50)
    with pytest.raises(glsim.DataError, match="more than the 50"):
        read_voc(file)


def annotation(*boxes, size=None, points=()):
    marks = [Mark(f"l.csv, line {i}: box", box) for i, box in enumerate(boxes, start=2)]
    return Annotation("l.csv: x.jpg", size, marks, [Mark("l.csv, line 9: point", p[1:], p[0]) for p in points])


def test_boxes_are_scaled_from_copies_and_cut_at_the_edge():
    same = fit(annotation((8, 5, 20.5, 10), size=SIZE), SIZE)
    assert same.boxes[0].sides == (8, 5, 20.5, 10) and same.changes == ()
    twice = fit(annotation((16, 10, 40, 20), size=(80, 60), points=[("eye", 20, 30)]), SIZE)
    assert twice.boxes[0].sides == (8, 5, 20, 10) and twice.points[0].sides == (10, 15) and twice.changes == ("scaled",)
    copy = fit(annotation((0, 0, 500, 333), size=(500, 333)), (320, 213))  # 213.12: a copy's sides are rounded
    assert copy.boxes[0].sides == pytest.approx((0, 0, 320, 213)) and copy.changes == ("scaled",)
    cut = fit(annotation((-3, 5, 20, 90)), SIZE)
    assert cut.boxes[0].sides == (0, 5, 20, 30) and cut.changes == ("cut",)
    assert fit(annotation((-0.5, 5, 20, 31)), SIZE).changes == ()  # less than a pixel is rounding
    assert fit(cut, SIZE).boxes == cut.boxes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (annotation((1, 2, 3, 4), (5, 6, 5, 9)), "l.csv, line 3: box is empty or turned round"),
        (annotation((50, 2, 60, 4)), "line 2: box lies outside of 40 x 30 pixels .width and height .* are not told"),
        (annotation((50, 2, 60, 4), size=SIZE), "line 2: box lies outside of 40 x 30 pixels$"),
        (annotation((1, 2, 3, 4), size=(30, 40)), r"l.csv: x.jpg is of 30 x 40 pixels, its image of 40 x 30 \(upright"),
        (annotation((1, 2, 3, 4), size=(40, 40)), r"is of 40 x 40 pixels"),
        (annotation(points=[("eye", 50, 3)]), "line 9: point lies outside of 40 x 30 pixels"),
    ],
)
def test_what_does_not_fit_its_image_is_named(given, said):
    with pytest.raises(glsim.DataError, match=said):
        fit(given, SIZE)


def test_annotations_are_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # shown turned by a quarter: 30 x 40 upright
    Image.new("RGB", SIZE).save(tmp_path / "x.jpg", exif=exif)
    boxes = write(tmp_path / "b.csv", "path,left,top,right,bottom,width,height", "x.jpg,2,3,28,39,30,40")
    (image,), _ = check_masks(find_annotated(tmp_path / "x.jpg", None, boxes, None).images)
    assert image.masks["box"].size == (30, 40) and image.masks["box"].boxes[0].sides == (2, 3, 28, 39)
    write(boxes, "path,left,top,right,bottom,width,height", "x.jpg,2,3,28,29,40,30")
    with pytest.raises(glsim.DataError, match="is of 40 x 30 pixels, its image of 30 x 40"):
        check_masks(find_annotated(tmp_path / "x.jpg", None, boxes, None).images)


def test_cub_against_copies_of_another_size(tmp_path):
    """Without sizes.txt, its own images say what size the boxes are of; without them, what lies outside is told."""
    copies = pictures(tmp_path / "copies", (20, 15))
    top, _ = write_cub(tmp_path, sizes=False)
    with pytest.raises(glsim.DataError, match="box 30,2,40,30 lies outside of 20 x 15 pixels .width and height"):
        check_masks(find_annotated(copies, None, top, None).images)
    pictures(top / "CUB_200_2011" / "images", names=("a/x.jpg", "b/y.jpg"))
    sound, _ = check_masks(find_annotated(copies, None, top, None).images)
    assert [mark.sides for mark in sound[0].masks["box"].boxes] == [(4, 2.5, 10, 5), (15, 1, 20, 15)]
    assert sound[0].points.visible()["tail", 0] == (19.5, 14.5)


@pytest.mark.parametrize("rule", ["square", "short"])
@pytest.mark.parametrize("size", [(263, 151), (33, 901), (101, 57)])
def test_a_box_goes_the_way_of_a_mask(rule, size):
    """The same pixels as the rectangle that is drawn on the image and resized with it; corners as points are its ends.

    Sides are odd, so that the middle of no pixel falls between two of the image, where the nearest is chance.
    """
    p, g = Preprocessing((32, 48), 1.25, (0.5,) * 3, (0.5,) * 3, rule), np.random.default_rng(0)
    for _ in range(20):
        (left, right), (top, bottom) = (np.sort(g.choice(side + 1, 2, replace=False)).tolist() for side in size)
        drawn = Image.new("L", size)
        ImageDraw.Draw(drawn).rectangle((left, top, right - 1, bottom - 1), fill=255)
        box = fit(annotation((left, top, right, bottom), points=[("a", left, top), ("b", right, bottom)]), size)
        (inside, counted), (expected, _) = to_view(box, p), to_view(drawn, p)
        assert torch.equal(inside, expected) and counted.all()
        if inside.any():
            (x0, y0), (x1, y1) = points_to_view(box, [("a", 0), ("b", 0)], p).tolist()
            rows, cols = inside.nonzero(as_tuple=True)
            for low, high, lines, side in ((x0, x1, cols, 48), (y0, y1, rows, 32)):
                assert abs(max(low, 0) - lines.min()) <= 0.5 and abs(min(high, side) - lines.max() - 1) <= 0.5
    assert points_to_view(None, [("a", 0)], p).isnan().all()


def test_lists_of_the_real_birds():
    top = ROOT.parent / "shared" / "data" / "cub20"
    if not top.is_dir():
        pytest.skip("cub20 is not there")
    found = find_annotated(top / "test", None, top / "boxes.csv", top / "parts.csv")
    assert len(found.images) == 585 and set(found.unused.values()) == {600}
    sound, bad = check_masks(found.images[::50])
    assert not bad and not any(image.masks["box"].changes for image in sound)
    assert all(len(image.masks["box"].boxes) == 1 for image in sound)
