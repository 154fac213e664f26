"""CKA against its definition, other measures against loops, on every kind of transformer."""

import itertools
import json

import pytest
import torch
from conftest import scene, small_model
from PIL import Image

import glsim
from glsim import cli
from glsim.interpret.representations import MEASURES, analyse, cka, gram, hsic


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_hsic(a, b):
    """The U-statistic: over all four different images, a_ij (b_ij + b_qr - 2 b_iq)."""
    terms = [a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q]) for i, j, q, r in itertools.permutations(range(len(a)), 4)]
    return sum(terms) / len(terms)


def test_hsic_agrees_with_its_definition():
    grams = torch.stack([gram(torch.randn(6, 3, generator=generator(i))) for i in range(3)])
    found = hsic(grams[:, None], grams[None])
    for i, j in itertools.product(range(3), repeat=2):
        assert found[i, j].item() == pytest.approx(naive_hsic(grams[i], grams[j]).item())


def test_cka_is_one_for_the_same_up_to_rotation_and_scale_and_none_for_strangers():
    x = torch.randn(50, 8, generator=generator())
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator(1)))[0]
    other = torch.randn(50, 8, generator=generator(2))
    found = cka(torch.stack([gram(v) for v in (x, 3 * x @ rotation + 5, other)]))
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.double))
    assert found[0, 1].item() == pytest.approx(1, abs=1e-5) and torch.equal(found, found.T)
    assert abs(found[0, 2]) < 0.1


def test_few_images_and_many_features_are_not_alike_by_bias():
    grams = torch.stack([gram(torch.randn(10, 5000, generator=generator(i))) for i in range(2)])
    centred = torch.eye(10, dtype=torch.double) - 0.1
    a, b = (centred @ g @ centred for g in grams)
    biased = (a * b).sum() / (a.norm() * b.norm())
    assert biased > 0.9 and abs(cka(grams)[0, 1]) < 0.3


@pytest.mark.parametrize("different", [0, 1])
def test_images_that_are_alike_arrange_nothing(different):
    model, said = small_model(), "the images are all alike, or all but one"
    images = torch.rand(1, 3, 64, 64, generator=generator()).repeat(7, 1, 1, 1)
    images[:different] = 0
    for size in (1, 3):
        with pytest.raises(glsim.DataError, match=said):
            analyse(model, images.split(size))
    rounded = torch.randn(200, generator=generator()) * (1 + 1e-6 * torch.randn(7, 200, generator=generator(1)))
    with pytest.raises(glsim.DataError, match=said):  # as tokens of one image from batches of several sizes
        cka(gram(rounded)[None])
    images[-1] = 1
    if different:
        found = torch.tensor(analyse(model, images.split(3)).cka.whole)
        torch.testing.assert_close(found.diagonal(), torch.ones(3))


@pytest.mark.parametrize(
    "backbone",
    [
        "vit_tiny_patch16_224",
        "vit_base_patch16_siglip_gap_224",
        "vit_small_patch14_reg4_dinov2",
        "beit_base_patch16_224",
    ],
)
def test_measures_agree_with_loops(backbone):
    size = 56 if "patch14" in backbone else 64
    model = small_model("plain", backbone, size)
    images = torch.randn(5, 3, size, size, generator=generator())
    found = analyse(model, images.split(2))
    assert found.images == 5 and found.layers == ["1", "2", "norm"]
    with torch.no_grad():
        f, layers = model.features(images), model.backbone.layers(images)
    torch.testing.assert_close(layers[-1][:, model.backbone.skip :], f.patches)
    for i, tokens in enumerate(layers):
        totals = dict.fromkeys(MEASURES, 0.0)
        for image in tokens:
            patches = image[model.backbone.skip :]
            cls = image[0] if model.backbone.num_prefix else patches.mean(dim=0)
            pairs = [(p, q) for p, q in itertools.permutations(patches, 2)]
            to_cls = [torch.cosine_similarity(p, cls, dim=0).item() for p in patches]
            totals["norm_cls"] += cls.norm().item()
            totals["norm_patch"] += sum(p.norm().item() for p in patches) / len(patches)
            totals["norm_patch_max"] += max(p.norm().item() for p in patches)
            totals["distance"] += sum((p - q).norm().item() for p, q in pairs) / len(pairs)
            totals["similarity"] += sum(torch.cosine_similarity(p, q, dim=0).item() for p, q in pairs) / len(pairs)
            totals["cls_distance"] += sum((p - cls).norm().item() for p in patches) / len(patches)
            totals["cls_similarity"] += sum(to_cls) / len(to_cls)
            totals["cls_similarity_max"] += max(to_cls)
        for name, total in totals.items():
            assert getattr(found, name)[i] == pytest.approx(total / 5, rel=1e-4, abs=1e-4), name
    for kind, vectors in (("whole", [t.flatten(1) for t in layers]), ("pooled", [t.mean(dim=1) for t in layers])):
        expected = cka(torch.stack([gram(v) for v in vectors]))
        torch.testing.assert_close(
            torch.tensor(getattr(found.cka, kind), dtype=torch.double), expected, atol=1e-4, rtol=1e-4
        )


def test_the_verb_writes_picture_and_table(tmp_path, capsys):
    glsim.save(small_model(), tmp_path / "m")
    for i in range(5):
        scene((60, 50), seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"")
    words = ["explain", "layers", str(tmp_path / "m"), str(tmp_path), "--out", str(tmp_path / "out"), "--json"]
    assert cli.main(words) == 3
    assert "bad.png: empty file" in capsys.readouterr().err
    assert cli.main([*words, "--skip-bad"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pictures"] == [] and len(result["skipped"]) == 1 and result["layers"]["images"] == 5
    table = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert table["cka"]["whole"][0][0] == pytest.approx(1) and set(MEASURES) <= set(table)
    with Image.open(tmp_path / "out" / "layers.png") as picture:
        assert picture.width > 1000
    assert cli.main([*words[:-1], "--skip-bad", "--limit", "3"]) == 3
    assert "layers: 3 images; 4 or more are needed" in capsys.readouterr().err
    (tmp_path / "same").mkdir()
    for i in range(4):
        scene((60, 50)).save(tmp_path / "same" / f"{i}.png")
    folder = tmp_path / "none"
    assert cli.main(["explain", "layers", words[2], str(tmp_path / "same"), "--out", str(folder)]) == 3
    assert "layers: the images are all alike" in capsys.readouterr().err and [p.name for p in folder.iterdir()] == [
        ".glsim"
    ]
    glsim.save(small_model("plain", "resnet18"), tmp_path / "r")
    assert cli.main(["explain", "layers", str(tmp_path / "r"), *words[3:-1]]) == 2
    assert "'resnet18' does not keep one grid of tokens" in capsys.readouterr().err
