"""Early answers, how they are gathered, and what `glsim calibrate` finds, against naive code."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, TINY, small_model
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef

import glsim
from glsim import ConfigError, DataError, cli
from glsim.checkpoints.bundle import amend, read_config
from glsim.data.images import BadImage
from glsim.data.readers import read_data
from glsim.evaluation import calibration, evaluate
from glsim.evaluation.confidence import calibration_error, graded, largest_rate
from glsim.files import document
from glsim.inference.predictor import answers, predict_images
from glsim.models.heads import top2_margin
from glsim.models.losses import objective
from glsim.training import train
from glsim.training.config import Train


@pytest.fixture(scope="module")
def model():
    return small_model(early_loss=0.5)


@pytest.fixture
def images():
    return torch.randn(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def early_run(birds, tmp_path_factory):
    """A run whose first pass can answer; its zero head was given values, so that answers differ."""
    out = tmp_path_factory.mktemp("early") / "run"
    tiny = TINY | {"options": {"top_o": 4, "early_loss": 1.0}}
    train.train(Train(data=str(birds), out=str(out), **tiny), progress=False)
    model = glsim.load(out)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.linear.weight, std=0.5)
    return glsim.save(model, out)


@pytest.fixture
def early(early_run, tmp_path):
    return shutil.copytree(early_run, tmp_path / "early")


def set_margin(folder, margin):
    config = json.loads((folder / "config.json").read_text())
    config["options"]["margin"] = margin
    (folder / "config.json").write_text(json.dumps(config))


# --- the model ----------------------------------------------------------------------------------------------------


def test_the_lead_is_the_difference_of_the_two_largest_probabilities():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    p = logits.softmax(1)
    torch.testing.assert_close(top2_margin(logits), torch.stack((p[0, 0] - p[0, 2], torch.tensor(0.0))))
    assert top2_margin(torch.zeros(2, 1)).tolist() == [1, 1]


def test_without_a_margin_it_answers_as_glsim_does(model, images):
    usual = small_model()
    usual.load_state_dict(model.state_dict())
    with torch.no_grad():
        mine, theirs = model(images), usual(images)
    torch.testing.assert_close((mine.logits, mine.crops), (theirs.logits, theirs.crops), atol=1e-5, rtol=1e-5)
    assert mine.needs_second_pass is None


@pytest.mark.parametrize("classifier", ["cls", "avg_cls", "max_cls"])
def test_the_first_answer_is_that_of_the_image_token_alone(images, classifier):
    model = small_model(early_loss=1.0, classifier=classifier)
    with torch.no_grad():
        given, first, _ = model.first_pass(images)
        alone = model.aggregator(model.backbone(images).cls[:, None])
    torch.testing.assert_close(given, model.backbone(images).cls, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first, model.head.linear(alone[:, 0]))


def test_training_adds_the_loss_of_the_first_answer(images):
    model = small_model(early_loss=0.25).train()
    labels = torch.arange(9) % 5
    output = model(images)
    _, first, _ = model.first_pass(images)
    usual = [torch.nn.functional.cross_entropy(x, labels, label_smoothing=0.1) for x in (output.logits, first)]
    loss = objective(output, labels)
    torch.testing.assert_close(loss, usual[0] + 0.25 * usual[1])
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "blocks.0.attn.q" not in n)


@pytest.mark.parametrize("count", [0, 5, 9])
def test_only_the_unsure_get_a_second_pass(model, images, count, monkeypatch):
    with torch.no_grad():
        full = model(images).logits
        _, first, _ = model.first_pass(images)
        margin = [*top2_margin(first).sort().values.tolist(), 2.0][count]
        unsure = top2_margin(first) < margin
        encoded = []
        counted = model.backbone.net.patch_embed.register_forward_hook(lambda _m, x, _o: encoded.append(len(x[0])))
        monkeypatch.setattr(model, "margin", margin)
        output = model(images)
        counted.remove()
    torch.testing.assert_close(output.logits, torch.where(unsure[:, None], full, first), atol=1e-5, rtol=1e-5)
    assert torch.equal(output.needs_second_pass, unsure)
    assert int(unsure.sum()) == count
    assert encoded == [9, count][: 1 + bool(count)]


def test_unsure_images_wait_for_a_full_batch(model, images, monkeypatch):
    """Batches of 4, 4 and 1, most images unsure: the second passes run in fours, and the order stays."""
    with torch.no_grad():
        monkeypatch.setattr(model, "margin", float(top2_margin(model.first_pass(images)[1]).sort().values[6]))
        wanted = model(images)
    sizes, second = [], model.second_pass
    monkeypatch.setattr(model, "second_pass", lambda *given: sizes.append(len(given[0])) or second(*given))
    outputs = list(answers(model, images.split(4)))
    assert [len(o.logits) for o in outputs] == [4, 4, 1]
    torch.testing.assert_close(torch.cat([o.logits for o in outputs]), wanted.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat([o.selection.boxes for o in outputs]), wanted.selection.boxes)
    assert sizes == [4, 2]


def test_waiting_images_do_not_keep_their_batches(model, images, monkeypatch):
    """One unsure image in each batch of 3: its copy waits, the batch goes."""
    leads = top2_margin(model.first_pass(images)[1]).detach()
    order = torch.cat([leads.argsort()[i::3] for i in range(3)])
    monkeypatch.setattr(model, "margin", float(leads.sort().values[3]))
    kept, alive = [], []

    def batches():
        for rows in order.split(3):
            batch = images[rows]
            kept.append(StorageWeakRef(batch.untyped_storage()))
            alive.append([not ref.expired() for ref in kept])
            yield batch
            del batch

    found = torch.cat([output.needs_second_pass for output in answers(model, batches())])
    assert int(found.sum()) == 3
    assert [row[:-2] for row in alive] == [[], [], [False]]  # the last two: at hand, and in the loop of `answers`


def test_mirrored_too_an_image_is_unsure_where_either_view_is(model, images, monkeypatch):
    with torch.no_grad():
        views = [top2_margin(model.first_pass(x)[1]) for x in (images, images.flip(-1))]
        monkeypatch.setattr(model, "margin", float(torch.cat(views).median()))
        first, second = (view < model.margin for view in views)
        (output,) = answers(model, [images], flip=True)
    assert (first != second).any() and torch.equal(output.needs_second_pass, first | second)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"margin": 0.5}, "early_loss"),
        ({"margin": -0.1, "early_loss": 1.0}, "from 0 to 1"),
        ({"margin": "much", "early_loss": 1.0}, "from 0 to 1"),
        ({"early_loss": -1.0}, "at least 0"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ConfigError, match=words):
        small_model(**options)


# --- the margin and the temperature -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("max_loss", [0.0, 5.0])
def test_the_margin_against_every_one_tried(seed, max_loss):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (40,), generator=generator)
    truth = torch.nn.functional.one_hot(labels, 4)
    first = torch.randn(40, 4, generator=generator) + 1.5 * truth
    second = first + 0.8 * torch.randn(40, 4, generator=generator) + 0.4 * truth
    if seed == 0:
        first[:10] = first[0]  # ties
    margin, unsure = calibration.find_margin(first, second, labels, max_loss)

    def lost(bound):
        mixed = torch.where((top2_margin(first) < bound)[:, None], second, first)
        return int((second.argmax(1) == labels).sum() - (mixed.argmax(1) == labels).sum())

    allowed = max_loss / 100 * 40
    tried = sorted({0.0, 2.0, *(x + 1e-6 for x in top2_margin(first).tolist())})
    good = [bound for i, bound in enumerate(tried) if all(lost(b) <= allowed for b in tried[i:])]
    wanted = top2_margin(first) < good[0]
    assert torch.equal(unsure, wanted)
    assert (margin is None) == bool(wanted.all())
    if margin is not None:
        assert torch.equal(top2_margin(first) < margin, wanted)


def test_the_temperature_is_the_one_the_labels_were_drawn_with():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    for scale in (0.25, 1.0, 3.0):
        assert calibration.fit_temperature(logits * scale, labels).value == pytest.approx(scale, rel=0.05)


def spread(right, wrong, gap=0.5, seed=0):
    """Logits of so many right answers, sure ones and others, and of wrong ones that the label misses by `gap`."""
    logits = torch.randn(right + wrong, 5, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(right + wrong) % 5
    rows = torch.arange(right + wrong)
    logits[rows, labels] = logits.max(dim=1).values + torch.linspace(0.05, 6, right + wrong)
    logits[rows[right:], (labels[right:] + 1) % 5] = logits[rows[right:], labels[right:]] + gap
    assert calibration.count_right(logits, labels) == right
    return logits, labels


@pytest.mark.parametrize(
    ("logits", "labels", "why"),
    [
        (torch.tensor([[3.0, 1.0]]), [0], "all 1 images are answered right"),
        (*spread(100, 0), "all 100 images are answered right"),
        (torch.tensor([[1.0, 1.0], [2.0, 0.0]]), [0, 0], "all 2 images are answered right"),  # a tie is no mistake
        (torch.zeros(4, 3), [0, 1, 2, 0], "all 4 images are answered right"),
        (torch.tensor([[3.0, 1.0]]), [1], "labels of 1 images have no more than the mean logit"),
        (torch.tensor([[0.0, 2.0, 1.0]] * 9), [0] * 9, "labels of 9 images have no more than the mean logit"),
        (torch.tensor([[3.0, 2.0, 0.0]]), [1], "1 images are too few"),
        (torch.tensor([[5.0, 0.0]] * 3 + [[0.0, 1e-6]]), [0] * 4, "4 images are too few"),
        (1e-6 * spread(90, 10)[0], spread(90, 10)[1], "the best one for 100 images is not in 0.0067 to 148"),
        (1e6 * spread(90, 10)[0], spread(90, 10)[1], "the best one for 100 images is not in 0.0067 to 148"),
    ],
)
def test_where_images_cannot_tell_a_temperature_it_stays_1(logits, labels, why):
    found = calibration.fit_temperature(logits, torch.as_tensor(labels))
    assert found.value == 1.0 and found.interval is None and why in found.why_not


@pytest.mark.parametrize(("gap", "told"), [(1e-3, False), (0.1, False), (0.5, False), (1.5, True), (3.0, True)])
def test_one_mistake_among_many_is_no_reason_to_be_sure(gap, told):
    """Near to where the likelihood has no maximum; where it tells a temperature, that of a naive search."""
    logits, labels = spread(99, 1, gap)
    found = calibration.fit_temperature(logits, labels)
    assert (found.why_not is None) == told and (told or found.value == 1.0)
    if told:
        tried = torch.logspace(-2, 2, 2001).tolist()
        naive = min(tried, key=lambda t: float(torch.nn.functional.cross_entropy(logits.double() / t, labels)))
        assert found.value == pytest.approx(naive, rel=0.01)
        assert found.interval[0] < found.value < found.interval[1] < 4 * found.interval[0]
        assert calibration.fit_temperature(7 * logits, labels).value == pytest.approx(7 * found.value, rel=1e-4)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(200):
        logits = 2 * torch.randn(80, 5, generator=generator)
        labels = torch.multinomial((logits / 1.5).softmax(1), 1, generator=generator)[:, 0]
        low, high = calibration.fit_temperature(logits, labels).interval
        held += low < 1.5 < high
    assert 180 <= held <= 199


@pytest.mark.parametrize(("wrong", "count", "most"), [(0, 1, 0.7301), (0, 59, 0.0438), (5, 100, 0.0992), (3, 3, 1.0)])
def test_the_error_that_so_many_answers_leave_possible(wrong, count, most):
    """Wilson's upper end solves (p - k/n) = z sqrt(p (1 - p) / n)."""
    found = largest_rate(wrong, count)
    assert found == pytest.approx(most, abs=1e-4)
    assert found - wrong / count == pytest.approx(1.6449 * (found * (1 - found) / count) ** 0.5, abs=1e-9)
    assert largest_rate(0, 0) == 1.0


def test_calibration_error_by_hand():
    """Two bins: 3 images of confidence 0.9, two right; 1 of confidence 0.6, wrong."""
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.4, 0.6]])
    error = calibration_error(*graded(p.log(), torch.tensor([0, 0, 0, 0])))
    assert error == pytest.approx(3 / 4 * abs(0.9 - 2 / 3) + 1 / 4 * 0.6, abs=1e-6)


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_calibrate_writes_what_eval_and_predict_use(early, birds, capsys):
    before = evaluate.evaluate_bundle(early, birds, workers=0)
    assert before.second_pass_share is None
    words = [str(early), "--data", str(birds), "--split", "test", "--max-loss", "100", "--workers", "0"]
    assert cli.main(["calibrate", *words]) == 0
    assert "second pass for 0.0% of the images, margin 0.0" in capsys.readouterr().out
    config = json.loads((early / "config.json").read_text())
    found = config["calibration"]
    assert config["options"]["margin"] == 0.0 and found["count"] == 9
    after = evaluate.evaluate_bundle(early, birds, workers=0)
    assert after.second_pass_share == 0.0 and after.correct == found["correct_first"] == found["correct"]
    both = evaluate.evaluate_bundle(early, birds, workers=0, options={"margin": None})
    assert both.correct == before.correct == found["correct_second"] and both.second_pass_share is None
    assert cli.main(["eval", str(early), "--data", str(birds), "--workers", "0", "--options.margin", "2"]) == 0
    assert "second pass for 100.0% of the images" in capsys.readouterr().out
    assert "Calibrated on 9 images" in (early / "README.md").read_text()
    path = next((birds / "test").glob("*/*"))
    said = predict_images(early, [str(path)], workers=0)
    assert said.second_pass_share == 0.0 and said.predictions[0].second_pass is False
    assert cli.main(["predict", str(early), str(path), "--workers", "0", "--format", "csv", "--top-k", "1"]) == 0
    printed = capsys.readouterr()
    assert "second pass for 0.0% of the images\n" in printed.err
    head, row = printed.out.splitlines()
    assert head.endswith(",bottom,second_pass") and row.endswith(",false")
    model = glsim.load(early)
    p = evaluate.preprocessing_of(model)
    with Image.open(path) as image, torch.no_grad():
        _, first, _ = model.first_pass(evaluate.eval_transform(p)(image.convert("RGB"))[None])
    wanted = (first / found["temperature"]).softmax(1).max()
    assert said.predictions[0].probabilities[0] == pytest.approx(float(wanted), abs=1e-5)


def test_no_loss_allowed_and_a_model_that_never_stops_early(early, run_folder, birds, tmp_path):
    found = calibration.calibrate_bundle(early, birds, split="test", max_loss=0, workers=0)
    assert found.correct >= found.correct_second
    assert found.nll[1] <= found.nll[0] + 1e-6
    usual = shutil.copytree(run_folder, tmp_path / "usual")
    found = calibration.calibrate_bundle(usual, birds, split="test", workers=0)
    assert "margin" not in document(found) and glsim.load(usual).config.calibration["temperature"] == found.temperature
    with pytest.raises(ConfigError, match=r"max_loss=1.0: .*usual spares no second pass; train with --options.early_l"):
        calibration.calibrate_bundle(usual, birds, split="test", max_loss=1.0)
    config = json.loads((usual / "config.json").read_text())
    assert config["calibration"]["temperature_kept"] == found.temperature_kept
    with pytest.raises(DataError, match=r"no split 'val'.*train with --val-fraction 0.1 to hold some images out"):
        calibration.calibrate_bundle(usual, birds, workers=0)
    with pytest.raises(ConfigError, match="writes into the bundle"):
        calibration.calibrate_bundle("hf-hub:me/model", birds)


def test_all_right_keeps_1_and_says_on_what_a_threshold_rests(run_folder, birds, tmp_path, capsys, monkeypatch):
    """The sure run: each logit of a label is the largest, so that any confidence could be made of it."""
    usual = shutil.copytree(run_folder, tmp_path / "usual")
    right = torch.nn.functional.one_hot(torch.arange(9) % 3).float()
    monkeypatch.setattr(calibration, "ask", lambda *_: calibration.Answers(torch.arange(9) % 3, right))
    words = ["calibrate", str(usual), "--data", str(birds), "--split", "test", "--max-error", "5", "--workers", "0"]
    assert cli.main(words) == 0
    printed, card = capsys.readouterr().out, (usual / "README.md").read_text()
    assert "9 images of test: temperature 1.000, kept at 1: all 9 images are answered right, and" in printed
    assert "that rests on 9 images: up to 23.1% of such answers may be wrong (95 %)" in printed
    assert (
        "Calibrated on 9 images of `birds`; `--reject` answers 100% of them, the confident ones (9 answers, 0" in card
    )
    found = read_config(usual).calibration
    assert found["temperature"] == 1.0 and found["error_at_most"] == pytest.approx(0.2312, abs=1e-4)


def test_answers_that_are_no_numbers_calibrate_nothing(early):
    model = glsim.load(early)
    model.head.linear.bias.data[0] = torch.inf
    with pytest.raises(DataError, match="4 of 4 images: the model's answer is no number"):
        calibration.ask(model, [(torch.zeros(4, 3, 64, 64), torch.zeros(4, dtype=torch.long))])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_keep_their_place_among_answers_that_come_late(early, birds, tmp_path, workers):
    loader = evaluate.make_loader(
        read_data(birds)["test"], evaluate.eval_transform(evaluate.preprocessing_of(glsim.load(early))), 9, 0
    )
    set_margin(early, float(top2_margin(calibration.ask(glsim.load(early), loader).first).median()))
    paths = sorted((birds / "test").glob("*/*"))
    for i in (0, 1, 2, 7):
        bad = tmp_path / f"bad{i}.png"
        bad.write_bytes(b"no image")
        paths.insert(i, bad)
    paths.append(tmp_path / "bad0.png")
    predictor = glsim.Predictor(early, batch_size=3, workers=workers)
    said = list(predictor.stream(paths))
    assert [str(a.path) for a in said] == [str(p) for p in paths]
    assert [isinstance(a, BadImage) for a in said] == [p.name.startswith("bad") for p in paths]
    one_by_one = [glsim.Predictor(early)(p)[0] for p in paths if not p.name.startswith("bad")]
    good = [a for a in said if not isinstance(a, BadImage)]
    assert [(a.labels, a.box, a.second_pass) for a in good] == [(a.labels, a.box, a.second_pass) for a in one_by_one]
    assert {a.second_pass for a in good} == {True, False}


def test_a_bundle_of_the_first_format_gets_a_card_too(tmp_path):
    folder = shutil.copytree(ROOT / "tests" / "checkpoints" / "old_bundle", tmp_path / "old")
    assert not read_config(folder).licence
    amend(folder, {}, calibration={"temperature": 2.0, "count": 7, "data": "birds", "threshold": 0.5, "coverage": 0.25})
    card = (folder / "README.md").read_text()
    assert "Calibrated on 7 images of `birds`; `--reject` answers 25% of them" in card
    assert card.count("Calibrated") == 1
