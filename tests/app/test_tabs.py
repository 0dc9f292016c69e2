"""The page's handlers, called as Gradio calls them, over tiny models: no browser, no server."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from attngen import AgentAttention, Plan
from pipelines.cli import UserError
from pipelines.engine.calls import Stopped
from pipelines.engine.models import ModelStore
from pipelines.engine.results import Progress
from pipelines.engine.rounds import Measured, Speed, measure
from pipelines.engine.session import Engine
from pipelines.engine.settings import Limits, Settings
from pipelines.images import read_settings, save_png
from pipelines.methods.uses import Use, parse_use
from tests.builders.programs import save_sit

gr = pytest.importorskip("gradio")
pytestmark = [pytest.mark.usefixtures("unmeasured"), pytest.mark.filterwarnings("ignore")]

from pipelines import ui_events  # noqa: E402  (they import gradio)
from pipelines.ui_api import add_endpoints  # noqa: E402
from pipelines.ui_calibrate import CalibrateTab  # noqa: E402
from pipelines.ui_compare import CompareTab, parse_methods, suggestions, table_of  # noqa: E402
from pipelines.ui_events import RUNS, Buttons, bounded, follow  # noqa: E402
from pipelines.ui_generate import GenerateTab, History, caption_of  # noqa: E402

ME = SimpleNamespace(session_hash="me")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The three tabs over a model with mediators and one with softmax attention."""
    folder = tmp_path_factory.mktemp("page")
    first, second = save_sit(folder / "mediator"), save_sit(folder / "softmax", "softmax")
    engine = Engine(ModelStore(first=[first, second]), Limits(256 * 256, 100, 8, 200))
    (folder / "out").mkdir()
    with gr.Blocks() as blocks:
        generate = GenerateTab(engine, folder / "out", lambda run: run)
        compare = CompareTab(engine, folder / "out", generate.form, lambda run: run)
        calibrate = CalibrateTab(engine, folder / "out", generate.form, lambda run: run)
        generate.wire(blocks)
        compare.wire()
        calibrate.wire(generate)
    return SimpleNamespace(
        blocks=blocks, generate=generate, compare=compare, calibrate=calibrate, form=generate.form, engine=engine,
        folder=folder / "out", first=first, second=second,
    )  # fmt: skip


def values(page, **changed):
    """What the browser sends for the form, steps few."""
    given = {part: part.value for part in page.form.inputs}
    given |= {page.form.steps: 2, page.form.label: "face", page.form.model: page.first}
    given |= {getattr(page.form, name): value for name, value in changed.items()}
    return list(given.values())


def run(events):
    """All updates in one, by component; each as its last value."""
    found = {}
    for update in events:
        found |= {
            part: value.get("value", value) if isinstance(value, dict) else value for part, value in update.items()
        }
    return found


def drawn(page, **changed):
    return run(page.generate.draw("me x", True, *values(page, new_seed=False, **changed)))[page.generate.status]


# Numbers

NUMBERS = {
    "steps": ("steps", (-1, 0, 101, None, "", 1.5)),
    "guidance": ("guidance", (-1, 1000, None, "", float("nan"))),
    "width": ("width", (-1, 0, 10**7, None, "", 16.5)),
    "height": ("height", (-1, 0, 10**7, None, "", 16.5)),
    "images": ("images|Number of pictures", (-1, 0, 9, None, "", 1.5)),
    "seed": ("seed", (-2, 5_000_000_000, 1.5, "x")),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, bad) in NUMBERS.items() for value in bad])
def test_a_number_that_is_none_is_named_on_every_tab(page, name, value):
    field = NUMBERS[name][0].split("|")
    sent = values(page, new_seed=False, **{name: value})
    told = [drawn(page, **{name: value})]
    told.append(run(page.compare.draw("me x", ["none", "mediators 4"], *sent))[page.compare.status])
    told.append(run(page.calibrate.run("me x", "largest error", 0.1, 1, *sent))[page.calibrate.status])
    for line in told:
        assert line.startswith("Not done") and any(word.lower() in line.lower() for word in field), line


@pytest.mark.parametrize(("bound", "stages", "named"), [
    (-1, 1, "Bound"), (None, 1, "Bound"), (10**6, 1, "Bound"), (0.1, 0, "Stages"), (0.1, 9, "Stages"),
    (0.1, None, "Stages"), (0.1, 1.5, "Stages"),
])  # fmt: skip
def test_numbers_of_calibrate(page, bound, stages, named):
    told = run(page.calibrate.run("me x", "largest error", bound, stages, *values(page)))
    assert told[page.calibrate.status].startswith(f"Not done: {named}")


@pytest.mark.parametrize("seed", [-1, None, ""])
def test_a_new_seed_may_be_asked_for_by_the_number(page, seed):
    seeds = {drawn(page, seed=seed).split("seed ")[1].split(",")[0] for _ in range(2)}
    assert len(seeds) == 2


def test_a_seed_that_is_not_used_is_not_checked(page):
    told = run(page.generate.draw("me x", True, *values(page, new_seed=True, seed=5_000_000_000)))
    assert told[page.generate.status].startswith("Done")


def test_gradios_own_checks_are_off_where_the_form_is_read(page):
    numbers = {page.form.steps, page.form.width, page.form.seed, page.form.images, page.calibrate.bound}
    readers = [event for event in page.blocks.fns.values() if numbers & set(event.inputs)]
    assert len(readers) >= 5
    assert not [event.fn for event in readers if event.preprocess]


# Buttons


@pytest.fixture
def buttons():
    with gr.Blocks() as page:
        found = Buttons(gr.Button("Start"), gr.Button("Stop", elem_id="stop"), gr.Textbox())
        found.page = page
    yield found
    RUNS.clear()


def wired(buttons, work):
    """What Gradio calls for the start button, after the first event of the chain."""
    with buttons.page:
        buttons.wire([buttons.start.click], work, [], [])
    return next(f.fn for f in buttons.page.fns.values() if f.fn.__name__ == "run_and_free")


def free(buttons, update):
    return update.get(buttons.start, {}).get("interactive") is True


@pytest.mark.parametrize("error", [None, ValueError("x"), gr.Error("x")])
def test_whatever_happens_the_buttons_are_free(buttons, error):
    def work(key):
        yield {buttons.status: "working"}
        if error:
            raise error

    call = wired(buttons, work)
    buttons._begin(ME)
    seen = []
    try:
        for update in call(ME):
            seen.append(update)
    except (ValueError, gr.Error):
        assert error is not None
    assert free(buttons, seen[-1]) and not RUNS
    if error:
        assert seen[-1][buttons.status].startswith("Not done")


def test_one_piece_of_work_at_a_time_for_each_visitor(buttons):
    buttons._begin(ME)
    with pytest.raises(gr.Error, match="still running"):
        buttons._begin(ME)
    buttons._begin(SimpleNamespace(session_hash="you"))


def test_stopped_while_it_waits(buttons):
    call = wired(buttons, lambda key: iter([{buttons.status: "working"}]))
    buttons._begin(ME)
    told = buttons._announce(ME)
    assert told[buttons.status] == ui_events.STOPPED and free(buttons, told)
    (only,) = list(call(ME))
    assert only[buttons.status] == ui_events.STOPPED


def test_stopped_is_shown_when_the_work_has_ended(buttons, page):
    ended = []

    def events(stop):
        for step in range(1000):
            if stop.is_set():
                time.sleep(0.2)
                ended.append(step)
                raise Stopped
            yield Progress("drawing", step, 1000)

    def work(key):
        stop = ui_events.stop_of(key)
        yield from follow(events(stop), buttons.status, lambda progress: {}, lambda result: {})

    call = wired(buttons, work)(ME)
    buttons._begin(ME)
    next(call)
    assert "Stopping" in buttons._announce(ME)[buttons.status]
    buttons._stop(ME)
    last = {}
    for update in call:
        last |= update
        assert update.get(buttons.status) != ui_events.STOPPED or ended
    assert last[buttons.status] == ui_events.STOPPED and free(buttons, last)


def test_work_has_a_budget_of_time_and_waiting_is_none(page):
    def work(stop):
        yield Progress("waiting for another image, 1 before this one")
        time.sleep(0.15)
        while not stop.is_set():
            yield Progress("drawing", 1, 10)
            time.sleep(0.01)
        raise Stopped

    stop, start = threading.Event(), time.monotonic()
    with pytest.raises(UserError, match="the most for one request"):
        list(bounded(work(stop), stop, 0.1))
    assert time.monotonic() - start > 0.24
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        list(bounded(work(stop), stop, 100))


# Models


def test_a_model_that_cannot_be_loaded_leaves_the_form_alone(page):
    for name in ("no such model", "", None, 7):
        found = run(page.generate.choose_model("me x", name, page.first))
        assert found[page.generate.status].startswith("Not done") and found[page.form.model] == page.first
        assert set(found) == {page.generate.status, page.form.model}


def test_everything_follows_the_model(page):
    found = run(page.generate.choose_model("me x", page.second, page.first))
    assert found[page.generate.status].startswith("Ready")
    assert found[page.form.fitted] == page.second and found[page.form.method] == "none"
    assert found[page.compare.methods] == suggestions(page.engine.models.get(page.second))[:4]
    assert "can be calibrated" in found[page.calibrate.fits]
    assert found[page.calibrate.map] is None and found[page.calibrate.use]["interactive"] is False
    found = run(page.generate.choose_model("me x", page.first, page.second))
    assert "cannot be calibrated" in found[page.calibrate.fits]
    assert "own: 4 mediators" in dict((value, title) for title, value in found_choices(page, page.first))["none"]


def found_choices(page, name):
    return page.form.model_values(page.engine.models.get(name))[page.form.method]["choices"]


def test_names_follow_the_numbers(page):
    form = page.form
    assert form._named(page.first, 25, 2.0, 16, 16)[:3] == ("Standard", "Square", "trained size")
    assert form._named(page.first, 7, 2.0, 32, 32)[:3] == (None, "Square", "2 × larger")
    assert form._named(page.first, 10, 2.0, 16, 18)[:3] == ("Quick", None, None)
    assert form._named(page.first, None, "", None, -1)[3] == ""
    assert "16 × the trained area" in form._named(page.first, 1, 1, 64, 64)[3]
    assert form._pictured(page.first, "heart")["selected_index"] == 1
    assert form._pictured(page.first, "crane, bird")["selected_index"] is None


def test_the_sentence_of_a_method_follows_it(page):
    form = page.form
    found = form._method_moved("mediators", *[part.value for part in form.option_parts.values()])
    assert "mediator" in found[form.about] and "bar" in found[form.timeline]
    values = [part.value for part in form.option_parts.values()]
    values[0] = "<script>"
    found = form._method_moved("mediators", *values)
    assert "<script>" not in found[form.timeline] and "&lt;script&gt;" in found[form.timeline]


# Recall and history


def test_a_picture_of_another_model_leaves_the_form_alone(page, tmp_path):
    path = tmp_path / "x.png"
    save_png(Image.new("RGB", (8, 8)), path, {"prompt": "a fox", "model": "owner/other", "seed": 1, "steps": 2})
    found = page.generate.fill(str(path))
    assert set(found) == {page.generate.status}
    assert found[page.generate.status].startswith("Not done") and "owner/other" in found[page.generate.status]


def test_an_earlier_picture_fills_the_form(page):
    drawn(page, label="heart", seed=5)
    history = History(page.folder, private=True)
    shown = history.shown("anyone")
    assert shown[0][1].startswith("heart, seed 5, 16x16")
    page.generate.history_of.private = True
    data = {"image": {"path": "/cache/x.png", "orig_name": Path(shown[0][0]).name}}
    picked = page.generate._pick(SimpleNamespace(value=data), ME)
    assert picked[page.generate.again]["interactive"] is True
    filled = page.generate.fill(picked[page.generate.chosen])
    assert filled[page.form.seed] == 5 and filled[page.form.new_seed] is False
    assert filled[page.generate.status].startswith("The settings are filled in")
    for value in (None, {}, {"image": {"path": "../../etc/passwd"}}):
        assert "no longer" in page.generate._pick(SimpleNamespace(value=value), ME)[page.generate.picked]


def test_visitors_see_their_own_pictures_only(tmp_path):
    history = History(tmp_path, private=False)
    for name in ("a", "b"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / f"{name}.png", {"prompt": name})
    history.add("one stop", [tmp_path / "a.png"])
    history.add("two stop", [tmp_path / "b.png"])
    assert history.shown("one") == [(str(tmp_path / "a.png"), caption_of(tmp_path / "a.png"))]
    assert history.shown("three") == []


def test_the_top_of_the_page_asks_for_what_can_be_drawn(page):
    for data in (SimpleNamespace(), SimpleNamespace(label=["x"], seed="a", mediators=None), SimpleNamespace(label=1)):
        assert page.generate._fill_live(data)[page.generate.status].startswith("Not done")


# Compare


def test_the_seed_in_the_field_is_compared_and_no_other_file_is_written(page, monkeypatch):
    monkeypatch.setattr("pipelines.engine.rounds.SECONDS", 0.0)
    before = set(page.folder.iterdir())
    found = run(page.compare.draw("me x", ["none", "mediators 1"], *values(page, new_seed=True, seed=77)))
    assert "seed 77" in found[page.compare.status]
    written = set(page.folder.iterdir()) - before
    assert len(written) == 2 and {read_settings(file)["seed"] for file in written} == {77}
    table = found[page.compare.table]
    assert table["data"][0][0] == "The model's own: 4 mediators" and table["data"][1][0] == "mediators 1"
    slider, apart = page.compare._choose(1, found[page.compare.files])
    assert slider[0].size == apart.size == (512, 512)
    assert np.asarray(apart).any()


def test_two_to_eight_methods():
    for typed in (None, [], ["none"], ["none"] * 9, "none"):
        with pytest.raises(UserError, match="methods"):
            parse_methods(typed)
    assert parse_methods(["none", "mediators 4"]) == [Use(), parse_use("mediators 4")]


def test_rounds_take_turns(page, monkeypatch):
    seconds = iter([1.0, 2.0, 4.0, 2.0, 1.0, 4.0])
    order = []

    def generate(settings, **kwargs):
        result = next(r.result for r in base.rows if r.result.settings.use == settings.use)
        order.append(settings.use.label)
        yield type(result)(**{**result.__dict__, "seconds": next(seconds)})

    settings, uses = Settings("face", model=page.first, steps=1), [Use(), parse_use("mediators 1")]
    *_, base = page.engine.compare(settings, uses)
    monkeypatch.setattr(page.engine, "compare", lambda *args, **kwargs: iter_of(base))
    monkeypatch.setattr(page.engine, "generate", generate)
    *_, found = measure(page.engine, settings, uses, rounds=3)
    assert isinstance(found, Measured)
    assert order == ["unchanged", "mediators 1", "mediators 1", "unchanged", "unchanged", "mediators 1"]
    assert found.seconds == [[1.0, 2.0, 1.0], [2.0, 4.0, 4.0]]
    assert found.speed(1) == Speed(0.5, 0.25, 0.5, 3) and found.steps == 1
    styles = table_of(found, ["a", "b"])["metadata"]["styling"]
    assert not any(styles[0]) and sum(map(bool, styles[1])) == 1
    table = table_of(Measured(base, [[1.0] * 6, [2.0] * 6], 1), ["a", "b"])
    assert not any(table["metadata"]["styling"][1]) and table["data"][1][4] == "0.50 (0.50 to 0.50)"


def test_rounds_are_short_where_drawings_are_long(page):
    settings = Settings("face", model=page.first, steps=40)
    *_, found = measure(page.engine, settings, [Use(), Use()], rounds=2, seconds=0.001)
    assert found.steps == 2 and len(found.seconds[0]) in (1, 2)
    assert found.median_seconds(0) > 5 * 0.001


def iter_of(result):
    yield result


@pytest.mark.parametrize(
    ("speed", "differs"),
    [
        (Speed(1.01, 0.62, 1.02, 8), False),
        (Speed(1.05, 1.01, 1.1, 7), True),
        (Speed(1.05, 1.01, 1.1, 3), False),
        (Speed(2.0, 1.5, 2.2, 2), False),
        (Speed(2.0, 2.0, 2.0, 1), False),
        (Speed(0.5, 0.4, 0.6, 6), True),
        (Speed(0.9, 0.85, 0.95, 3), False),
    ],
)
def test_what_can_be_told_from_one(speed, differs):
    assert speed.differs is differs
    assert str(speed).startswith("not told from 1") is not differs


# Calibrate


class FakePlan:
    """A plan as calibration returns it, without its minutes."""

    def __init__(self, plan, summary):
        self.to_json, self.save = plan.to_json, plan.save
        plot = lambda path: Image.new("L", (4, 4)).save(path)
        self.measurements = SimpleNamespace(summary=lambda: summary, plot=plot)


def test_a_calibrated_plan_tells_its_seconds_and_is_drawn_with(page, monkeypatch):
    plan = FakePlan(Plan.of(AgentAttention(num_agents=4)), "2.10 s exact, 1.00 s with the plan")
    asked = {}
    monkeypatch.setattr(page.engine, "calibrate", lambda *args, **given: asked.update(given) or iter_of(plan))
    found = run(page.calibrate.run("me x", "times faster", 1.5, 1, *values(page, model=page.second)))
    assert found[page.calibrate.status].startswith("Done: 2.10 s exact, 1.00 s with the plan.")
    assert asked["speedup"] == 1.5 and "max_error" not in asked
    chosen = page.calibrate._use(found[page.calibrate.text])
    assert chosen[page.form.method] == "plan"


# For programs


@pytest.fixture(scope="module")
def endpoints(page):
    with gr.Blocks() as blocks:
        add_endpoints(page.engine, page.folder, lambda run: run)
    return blocks


def test_endpoints_explain_every_argument(endpoints):
    named = endpoints.get_api_info()["named_endpoints"]
    assert set(named) == {"/generate", "/compare"}
    for endpoint in named.values():
        for parameter in endpoint["parameters"]:
            assert f"\n{parameter['parameter_name']}: " in endpoint["description"], parameter


def called(endpoints, name, **given):
    function = next(event.fn for event in endpoints.fns.values() if event.api_name == name)
    *_, last = function(**given)
    return last


def test_endpoints_have_the_limits_of_the_page(endpoints, page):
    for given in ({"methods": ["none"] * 9}, {"methods": ["none"]}, {"methods": ["none", "<b>"]}, {"steps": 10**6}):
        with pytest.raises(gr.Error) as refused:
            called(endpoints, "compare", **{"prompt": "face", "methods": ["none", "none"], **given})
        assert "&lt;" not in refused.value.message
    with pytest.raises(gr.Error, match="pixels"):
        called(endpoints, "generate", prompt="face", width=10**4, height=10**4)


def test_a_comparison_names_its_files_and_its_rounds(endpoints, page, monkeypatch):
    monkeypatch.setattr("pipelines.engine.rounds.ROUNDS", 1)
    files, told = called(endpoints, "compare", prompt="face", methods=["none", "mediators 1"], steps=1, seed=3)
    assert [row["files"] for row in told["rows"]] == [[file["orig_name"]] for file in files]
    assert set(told["rows"][1]["speedup"]) == {"median", "low", "high", "rounds", "differs"}
    json.dumps(told, allow_nan=False)


def test_no_path_of_the_server_is_in_the_page(page):
    assert str(page.folder) not in json.dumps(page.blocks.get_config_file(), default=str)
