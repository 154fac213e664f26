"""The page as a person uses it, in headless Chromium: an image goes in, the answer is read off the page."""

import base64
import re
import shutil

import pytest
from conftest import SHARED, scene
from test_server import GOOD

import glsim
import glsim.data.images

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra browser is not installed")
serve = pytest.importorskip(
    "glsim.inference.server", reason="the extra demo is not installed", exc_type=glsim.ConfigError
)
expect = sync_api.expect
expect.set_options(timeout=20_000)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)"),
]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
FLOWERS = SHARED / "data" / "flowers12" / "test"


@pytest.fixture(scope="module")
def photo(tmp_path_factory, birds):
    """A real photograph where there is one, else a drawn bird."""
    file = tmp_path_factory.mktemp("photo") / "photo.jpg"
    shutil.copy(min((FLOWERS if FLOWERS.is_dir() else birds / "test").rglob("*.jpg")), file)
    return file


@pytest.fixture(scope="module")
def site(run_folder):
    with serve.running(run_folder, port=0, max_mb=2) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[WIDE, NARROW], ids=["wide", "narrow"])
def page(request, chromium, site):
    """A fresh page on the server, which must ask nobody else and not complain."""
    context = chromium.new_context(viewport=request.param)
    page = context.new_page()
    asked, complaints = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.goto(site)
    expect(page.locator("#about")).to_contain_text("3 classes")
    yield page
    context.close()
    elsewhere = [url for url in asked if not url.startswith((site, "data:", "blob:"))]
    assert not elsewhere
    # Chromium itself notes every answer that is an error, as some tests want it to be.
    assert not [text for text in complaints if not re.match(r"Failed to load resource: .* (400|413|415|503)", text)]


def upload(page, *paths):
    page.set_input_files("#file", [str(path) for path in paths])


def answered(page, count=1):
    """The panels, once the model has answered in all of them."""
    expect(page.locator('.panel[aria-busy="false"]')).to_have_count(count)
    return page.locator(".panel")


def read(panel):
    """The answers of a panel: (label, percent) from top to bottom."""
    return [tuple(row.split("\n")) for row in panel.locator(".answers li").all_inner_texts()]


def expected(source, path, **options):
    (answer,) = glsim.Predictor(glsim.load(source, **options))(path)
    pairs = zip(answer.labels, answer.probabilities, strict=True)
    return [(label.replace("_", " "), f"{100 * p:.1f} %") for label, p in pairs], answer.box


def box_shown(panel, size):
    """The drawn box in pixels of the photograph."""
    frame, stack = (panel.locator(s).bounding_box() for s in (".frame", ".stack"))
    scale = size[0] / stack["width"], size[1] / stack["height"]
    left, top = (frame["x"] - stack["x"]) * scale[0], (frame["y"] - stack["y"]) * scale[1]
    return left, top, left + frame["width"] * scale[0], top + frame["height"] * scale[1]


def fits(page):
    """Nothing sticks out to the side."""
    return page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


def test_an_uploaded_image_is_answered(page, run_folder, photo):
    assert fits(page)
    upload(page, photo)
    panel = answered(page)
    answers, box = expected(run_folder, photo)
    assert read(panel) == answers
    size = glsim.data.images.open_image(photo).size
    assert box_shown(panel, size) == pytest.approx(box, abs=1.5)
    for part in (".photo", ".heat", ".crop img"):
        assert panel.locator(part).evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    expect(panel.locator(".stage figcaption")).to_contain_text("photo.jpg")
    expect(page.locator("#status")).to_have_text(f"{answers[0][0]}, {answers[0][1]}")
    assert fits(page)


def test_mechanism_and_patches_update_in_place(page, run_folder, photo):
    upload(page, photo)
    panel = answered(page)
    first = read(panel), panel.locator(".heat").get_attribute("src")
    with page.expect_response(re.compile("metric=attention")):
        panel.get_by_label("Mechanism").select_option("attention")
    answered(page)
    assert read(panel) == expected(run_folder, photo, metric="attention")[0]
    assert panel.locator(".heat").get_attribute("src") != first[1]
    expect(panel.locator(".metric-about")).to_contain_text("The model was trained with GLS cos.")
    with page.expect_response(re.compile("top_o=12")):
        panel.locator("input[type=number]").fill("12")
    answered(page)
    answers, box = expected(run_folder, photo, metric="attention", top_o=12)
    assert read(panel) == answers and panel.locator("input[type=range]").input_value() == "12"
    assert box_shown(panel, glsim.data.images.open_image(photo).size) == pytest.approx(box, abs=1.5)
    with page.expect_response(re.compile("top_o=13")):
        panel.locator("input[type=range]").press("ArrowRight")
    answered(page)
    assert read(panel) == expected(run_folder, photo, metric="attention", top_o=13)[0]
    panel.locator("input[type=number]").fill("99")  # there are 16: nothing is asked
    panel.locator("input[type=number]").blur()
    assert panel.locator("input[type=number]").input_value() == "13"


def test_two_mechanisms_side_by_side(page, run_folder, photo):
    upload(page, photo)
    answered(page)
    page.get_by_label("Compare two").check()
    first, second = answered(page, 2).all()
    assert read(first) == expected(run_folder, photo)[0]
    assert read(second) == expected(run_folder, photo, metric="attention")[0]
    expect(page.locator("#difference")).to_contain_text("the boxes overlap by")
    a, b = first.bounding_box(), second.bounding_box()
    assert (a["y"] == b["y"]) == (page.viewport_size == WIDE) and fits(page)
    page.get_by_label("Compare two").uncheck()
    answered(page)
    expect(page.locator("#difference")).to_be_hidden()


def test_bad_files_are_said_and_do_not_leave_the_last_answer_standing(page, photo, tmp_path):
    upload(page, photo)
    answered(page)
    for name, content, said in (
        ("cut.jpg", GOOD[:500], "cut.jpg cannot be read: truncated"),
        ("notes.pdf", b"%PDF-1.7", "notes.pdf cannot be read: not an image"),
        ("large.png", bytes(2_100_000), "large.png is too large: 2.1 MB, limit 2 MB."),
    ):
        (tmp_path / name).write_bytes(content)
        upload(page, tmp_path / name)
        expect(page.get_by_role("alert")).to_contain_text(said)
        expect(page.locator("#result")).to_be_hidden()
        expect(page.get_by_role("button", name="Try again")).to_be_hidden()
    upload(page, photo)
    answered(page)
    expect(page.locator("#problem")).to_be_hidden()


def test_dropping_pasting_and_examples_work_too(page, run_folder, tmp_path):
    scene((90, 60), 8).save(tmp_path / "dropped.png")
    content = base64.b64encode((tmp_path / "dropped.png").read_bytes()).decode()
    transfer = page.evaluate_handle(
        """content => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            transfer.items.add(new File([bytes], "dropped.png"));
            return transfer;
        }""",
        content,
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    expect(page.locator("body")).to_have_class("over")
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    panel = answered(page)
    expect(page.locator("body")).to_have_class("chosen")
    assert read(panel) == expected(run_folder, tmp_path / "dropped.png")[0]

    page.get_by_role("button", name="Example: bird 2.jpg").press("Enter")
    expect(panel.locator(".stage figcaption")).to_contain_text("bird 2.jpg")
    assert page.get_by_role("button", name="Example: bird 2.jpg").get_attribute("aria-pressed") == "true"
    page.evaluate("t => dispatchEvent(new ClipboardEvent('paste', {clipboardData: t}))", transfer)
    expect(panel.locator(".stage figcaption")).to_contain_text("dropped.png")


def test_a_keyboard_reaches_everything(page, photo):
    upload(page, photo)
    answered(page)
    page.locator("body").focus()
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(e => e.id || e.type || e.tagName)(document.activeElement)"))
    assert {"file", "button", "compare", "box", "opacity", "select-one", "range", "number"} <= reached


def test_a_server_that_is_gone_is_said_and_can_be_asked_again(chromium, run_folder, photo):
    context = chromium.new_context(viewport=WIDE)
    page = context.new_page()
    with serve.running(run_folder, port=0) as url:
        page.goto(url)
        upload(page, photo)
        answered(page)
    page.locator(".panel").get_by_label("Mechanism").select_option("psm")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    with serve.running(run_folder, port=int(url.rpartition(":")[2])):
        page.get_by_role("button", name="Try again").click()
        assert read(answered(page)) == expected(run_folder, photo, metric="psm")[0]
        expect(page.locator("#problem")).to_be_hidden()
    context.close()
