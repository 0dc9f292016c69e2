"""The page in a real browser, as people use it: one server with the model that ships, few steps."""

import hashlib
import io
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import attngen
from attngen import SiTPipeline
from tests.app.serving import (
    CHROMIUM,
    FAULTY,
    FIRST_MODEL,
    FLAGS,
    NOT_FINITE,
    OUT_OF_MEMORY,
    SLOW_MODEL,
    Pages,
    Server,
)
from tests.builders.programs import save_sit

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "pictures"


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder, folder.with_name("log.txt"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def address(server):
    return server.address


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(browser, address):
    pages = Pages(browser, address)
    yield pages
    pages.close()


@pytest.fixture
def visit(request, pages):
    failed = request.session.testsfailed
    pages.shared().reset(STEPS)
    yield pages.visit
    visit = pages.visit
    if request.session.testsfailed > failed:
        pages.close()
    visit.check()


def files_in(folder):
    return {path.name for path in folder.iterdir()}


def digest(path):
    return hashlib.sha256(np.asarray(Image.open(path)).tobytes()).hexdigest()


def generate(visit):
    visit.press("generate")
    return visit.wait_for("Done")


# Generate


def test_first_picture_is_one_click_away(pages, folder):
    start = time.monotonic()
    visit = pages.shared()
    generate(visit)
    taken = time.monotonic() - start
    visit.page.wait_for_selector("#gallery img")
    assert "image in" in visit.page.input_value("#cost textarea")
    (made,) = files_in(folder)
    assert Image.open(folder / made).size == (128, 128)
    assert taken < 120, f"{taken:.0f} s from opening the page; under 20 s on a machine that does nothing else"
    visit.check()


def test_stop_ends_the_drawing_and_writes_nothing(visit, folder):
    visit.set("steps", 250)
    visit.set("images", 8)
    before = files_in(folder)
    visit.press("generate")
    visit.page.wait_for_function("document.querySelector('#status textarea').value.includes('step')")
    visit.page.keyboard.press("Escape")
    visit.wait_for("Stopped", seconds=20)
    visit.set("steps", STEPS)
    visit.set("images", 1)
    start = time.monotonic()
    generate(visit)  # the lock of the model is free again, and only this request wrote
    assert time.monotonic() - start < 30
    assert len(files_in(folder) - before) == 1


def test_method_shows_its_own_options_and_draws(visit):
    assert not visit.page.is_visible("#mediators-mediators textarea, #mediators-mediators input")
    visit.page.check("#method input[value=mediators]")
    visit.page.wait_for_selector("#mediators-mediators textarea, #mediators-mediators input", state="visible")
    assert "mediators" in generate(visit)


def test_a_schedule_is_dragged(visit):
    visit.page.check("#method input[value=mediators]")
    field = visit.page.locator("#mediators-mediators :is(textarea, input)").first
    field.fill("1:4,0.5:16")
    visit.page.wait_for_function("document.querySelectorAll('#timeline .bar').length == 2")
    bars = visit.page.locator("#timeline .bars").bounding_box()
    edge = visit.page.locator("#timeline .bar").nth(1).bounding_box()
    mouse, y = visit.page.mouse, edge["y"] + edge["height"] - 20
    mouse.move(edge["x"] + 5, y)
    mouse.down()
    mouse.move(bars["x"] + 0.75 * bars["width"], y, steps=3)
    mouse.up()
    mouse.move(bars["x"] + 20, y)
    mouse.down()
    mouse.move(bars["x"] + 20, y - 40, steps=3)
    mouse.up()
    assert field.input_value() == "1:8,0.25:16"


def test_keyboard_alone_draws(visit):
    visit.page.focus("#label input")
    visit.page.evaluate("document.querySelector('#status textarea').value = ''")
    visit.page.keyboard.press("Control+Enter")
    visit.wait_for("Done")


def test_every_field_has_a_name(visit):
    nameless = visit.page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, button, select")].filter((e) => e.offsetParent
          && !(e.labels && e.labels.length) && !e.getAttribute("aria-label") && !e.getAttribute("aria-labelledby")
          && !e.title && !e.textContent.trim() && !e.placeholder && !e.closest("label")).map((e) => e.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize(("name", "value"), [("width", "33"), ("seed", "-2"), ("steps", ""), ("images", "1.5")])
def test_bad_value_ends_in_a_message_and_the_next_request_works(visit, name, value):
    field = visit.page.locator(f"#{name} input").first
    before = field.input_value()
    visit.page.uncheck("#new-seed input")
    visit.set(name, value)
    visit.press("generate")
    line = visit.wait_for("Not done")
    assert value in line and name in line.lower().replace("number of pictures", "images")
    visit.page.wait_for_function("!document.querySelector('#generate').disabled")
    visit.set(name, before)
    generate(visit)


def test_the_top_of_the_page_draws_with_one_click(visit):
    if not visit.page.is_visible("#hero"):
        pytest.skip("the page has no samples")
    visit.page.fill("#hero input[type=range]", "0")
    visit.page.locator("#hero .classes button").nth(2).click()
    assert "num_mediators=1" in visit.page.inner_text("#hero .line1")
    visit.page.evaluate("document.querySelector('#status textarea').value = ''")
    visit.page.click("#hero .live")
    told = visit.wait_for("Done")
    assert "mediators 1" in told and visit.page.input_value("#label input") in told


def test_fullscreen_shows_the_whole_picture(visit):
    generate(visit)
    visit.page.wait_for_selector("#gallery img")
    visit.page.locator("#gallery img").first.click()
    visit.page.locator("#gallery [aria-label=Fullscreen], #gallery [title=Fullscreen]").first.click()
    visit.page.wait_for_timeout(500)
    box = visit.page.locator("#gallery img[data-testid=detailed-image]").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= visit.page.evaluate("innerHeight")
    visit.page.keyboard.press("Escape")
    visit.page.reload()
    visit.wait_until_filled()


# Recall


def test_recalled_picture_is_the_same_to_the_pixel(visit, folder):
    visit.choose("label", "heart")
    visit.page.check("#method input[value=mediators]")
    before = files_in(folder)
    generate(visit)
    (first,) = files_in(folder) - before
    visit.reset(STEPS + 1)
    visit.recall(folder / first)
    told = visit.wait_for("Done: heart")
    (second,) = files_in(folder) - before - {first}
    assert f"seed {first.split('-')[-2]}" in told and f"steps: {STEPS}, mediators" in told
    assert digest(folder / first) == digest(folder / second)


def test_broken_picture_is_refused_and_the_page_lives(visit, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    visit.recall(bad)
    assert "cannot be recalled" in visit.wait_for("Not done")
    visit.toast("cannot be recalled")
    generate(visit)


# Compare


def test_compare_shows_a_table_a_slider_and_the_difference(visit):
    visit.show("Compare")
    visit.press("compare", "compare-status")
    assert "warm-up" in visit.wait_for("Done", "compare-status")
    visit.page.wait_for_selector("#slider img")
    visit.page.wait_for_selector("#difference img")
    visit.page.wait_for_function("document.querySelectorAll('#side img').length >= 3")
    table = visit.page.inner_text("#table")
    assert all(word in table for word in ("Operations saved", "16 mediators", "mediators 4")), table


# Faults


def test_after_a_restart_the_form_is_as_it_was_left(visit, server):
    visit.choose("label", "clock")
    visit.page.check("#method input[value=mediators]")
    visit.page.locator("#mediators-mediators textarea, #mediators-mediators input").first.fill("1:3,0.4:9")
    visit.page.wait_for_timeout(3000)  # until the browser has kept it
    server.kill()
    visit.press("generate")
    visit.page.get_by_text("Connection to the server was lost").wait_for()
    visit.page.evaluate("window.attngenRemembers = false")
    server.start(FAULTY)  # the page of the tests that follow
    visit.wait_until_filled()  # it comes back by itself
    assert visit.wait_for("Ready").endswith("as you left it.")
    assert visit.page.input_value("#label input") == "clock"
    assert visit.page.is_checked("#method input[value=mediators]")
    told = generate(visit)
    assert told.startswith("Done: clock") and f"steps: {STEPS}, mediators 1:3,0.4:9" in told
    visit.faults.clear()  # of the time without a server


def test_a_form_that_is_not_to_be_kept_is_forgotten(visit):
    visit.choose("label", "clock")
    visit.page.uncheck("#remember input")
    visit.page.wait_for_timeout(3000)
    visit.page.reload()
    visit.wait_until_filled()
    assert visit.page.input_value("#label input") == "face"
    visit.open_details()
    visit.page.check("#remember input")


@pytest.fixture
def faulty(server, visit):
    if server.program != FAULTY:
        server.kill()
        server.start(FAULTY)
        visit.page.reload()
        visit.wait_until_filled()
        visit.open_details()
    return visit


@pytest.mark.parametrize(("seed", "told"), [(OUT_OF_MEMORY, "smaller or fewer images"), (NOT_FINITE, "not finite")])
def test_a_fault_ends_in_a_message_and_the_next_request_works(faulty, folder, seed, told):
    before = files_in(folder)
    faulty.page.uncheck("#new-seed input")
    faulty.set("seed", seed)
    faulty.press("generate")
    line = faulty.wait_for("Not done")
    assert told in line and "Traceback" not in line
    faulty.toast(told)
    assert files_in(folder) == before
    faulty.set("seed", 1)
    generate(faulty)
    assert len(files_in(folder) - before) == 1


def test_a_model_that_loads_blocks_nobody(faulty, pages):
    other = pages.open()
    other.choose("model", SLOW_MODEL)
    other.wait_for(f"loading {SLOW_MODEL}")
    start = time.monotonic()
    generate(faulty)
    assert time.monotonic() - start < 30
    other.page.keyboard.press("Escape")
    assert "background" in other.wait_for("Stopped")
    assert other.page.input_value("#model input") == FIRST_MODEL
    assert "Done" in generate(other)
    other.context.close()
    other.check()


# Calibrate


def test_a_calibrated_plan_is_shown_saved_and_drawn_with(visit, folder, tmp_path):
    page, model = visit.page, save_sit(tmp_path / "model", "softmax")
    verdict = "#calibrate-model textarea, #calibrate-model input"
    visit.show("Calibrate")
    assert "cannot be calibrated" in page.input_value(verdict)
    visit.show("Generate")
    visit.choose("model", model)
    visit.wait_for("Ready")
    visit.set("steps", 2)
    visit.show("Calibrate")
    page.wait_for_function(f"document.querySelector('{verdict}').value.includes('can be')")
    visit.set("bound", 1000)
    visit.set("stages", 1)
    before = files_in(folder)
    visit.press("calibrate", "calibrate-status")
    page.wait_for_function("document.querySelector('#calibrate-status textarea').value.includes('network call')")
    visit.wait_for("Done", "calibrate-status")
    page.wait_for_selector("#heat-map img")
    (plan,) = (name for name in files_in(folder) - before if re.fullmatch(r"plan-\w+\.json", name))
    attngen.apply(SiTPipeline.from_pretrained(model), str(folder / plan)).remove()
    page.evaluate("document.querySelector('#status textarea').value = ''")
    page.click("#use-plan")
    assert ", plan." in visit.wait_for("Done")
    assert page.is_checked("#method input[value=plan]")
    assert "attention layers" in page.input_value("#cost textarea")


# Look


def check_on_a_phone(visit):
    for tab in ("Compare", "Calibrate", "Generate"):
        visit.show(tab)
        visit.page.wait_for_timeout(200)
        assert visit.overflow() <= 0, tab
    visit.page.evaluate("scrollTo(0, 0)")
    generate(visit)
    visit.page.wait_for_selector("#gallery img")
    visit.page.wait_for_timeout(600)
    assert visit.overflow() <= 0, "with a picture"
    assert visit.page.locator("#gallery img").first.bounding_box()["y"] < 844, "the picture is not in view"
    order = [visit.page.locator(f"#{name}").bounding_box()["y"] for name in ("buttons", "output", "more")]
    assert order == sorted(order), "the picture is not right under the buttons"


def test_fits_a_phone(visit):
    visit.page.set_viewport_size({"width": 390, "height": 844})
    check_on_a_phone(visit)
    assert not visit.page.evaluate("document.body.classList.contains('dark')")


def test_fits_a_phone_in_the_dark(pages):
    visit = pages.open("/?__theme=dark", 390, 844)
    visit.open_details()
    visit.set("steps", STEPS)
    check_on_a_phone(visit)
    assert visit.page.evaluate("document.body.classList.contains('dark')")
    visit.context.close()
    visit.check()


# From outside


def answer(address, path="/", data=None, **headers):
    request = urllib.request.Request(address + path, data, {k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as got:
            return got.status
    except urllib.error.HTTPError as error:
        return error.code


def test_foreign_hosts_and_sites_are_refused(address):
    assert answer(address) == 200
    assert answer(address, Host="evil.example") == 400
    body = b'{"data": []}'
    assert answer(address, "/gradio_api/call/generate", body, Origin="http://evil.example") == 403
    assert answer(address, "/gradio_api/call/generate", body, Origin="null") == 403
    assert answer(address, "/gradio_api/upload", b"x", Sec_Fetch_Site="cross-site") == 403


def test_only_its_own_folder_is_served(address, folder):
    (folder / "own.png").write_bytes(png())
    assert answer(address, f"/gradio_api/file={folder}/own.png") == 200
    for path in ("/etc/passwd", f"{folder}/../log.txt", "README.md", "pipelines/engine/session.py"):
        assert answer(address, f"/gradio_api/file={path}") in (400, 403, 404), path


def png():
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "PNG")
    return content.getvalue()


# Programs


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    from gradio_client import Client

    return Client(address, verbose=False, download_files=tmp_path_factory.mktemp("client"), analytics_enabled=False)


def test_endpoints_draw_and_compare(client):
    files, told = client.predict(prompt="heart", steps=STEPS, seed=3, api_name="/generate")
    assert len(files) == 1 and told["seconds"] > 0
    files, told = client.predict(prompt="heart", methods=["none", "mediators 4"], steps=STEPS, api_name="/compare")
    assert len(files) == 2 and len(told["rows"]) == 2


def test_only_the_two_endpoints_are_named(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/generate", "/compare"}


def test_many_at_once_are_all_answered_and_equal_the_ones_drawn_alone(client):
    def draw(seed):
        files, _ = client.predict(prompt="clock", steps=1, seed=seed, api_name="/generate")
        return digest(path_of(files[0]))

    alone = [draw(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(draw, k % 2) for k in range(16)]
    full = 0
    for k, got in enumerate(answers):
        if got.exception() is None:
            assert got.result() == alone[k % 2]
        else:
            assert "full" in str(got.exception())
            full += 1
    assert full < 8


def path_of(file):
    return file if isinstance(file, str) else file["path"]
