"""How the page starts, and when it refuses to; what stands in front of it."""

import asyncio
import subprocess
import sys

import pytest

import app
from pipelines import guard
from pipelines.ui_card import Card
from tests.app.serving import ROOT


@pytest.fixture
def no_password(monkeypatch):
    monkeypatch.delenv(app.PASSWORD, raising=False)
    monkeypatch.delenv("SPACE_ID", raising=False)


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        app.parse_arguments(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_loopback_is_the_default(no_password):
    assert guard.is_loopback(app.parse_arguments([]).host)


@pytest.mark.parametrize("argv", [["--host", "0.0.0.0"], ["--host", "192.168.1.2", "--user", "me"], ["--host", "::"]])
def test_other_addresses_need_a_password(no_password, capsys, argv):
    assert app.PASSWORD in refusal(capsys, *argv)


def test_short_passwords_are_refused(no_password, capsys, monkeypatch):
    monkeypatch.setenv(app.PASSWORD, "1234567")
    assert "8 characters" in refusal(capsys, "--host", "0.0.0.0", "--user", "me")
    monkeypatch.setenv(app.PASSWORD, "12345678")
    assert app.parse_arguments(["--host", "0.0.0.0", "--user", "me"]).password == "12345678"


def test_port_that_does_not_exist(no_password, capsys):
    assert "70000" in refusal(capsys, "--port", "70000")


def test_a_space_serves_where_its_proxy_looks(no_password, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "someone/attngen")
    assert app.parse_arguments([]).host == "0.0.0.0"


def test_help_loads_neither_torch_nor_gradio():
    code = (
        "import sys, app\n"
        "try: app.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'gradio', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--host" in done.stdout


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "letter.html").write_text("dear")
    with pytest.raises(app.cli.UserError, match="letter.html"):
        app.prepare_folder(tmp_path)


# The guard


def passed(hosts=guard.LOOPBACK_NAMES, method="POST", kind="http", **headers):
    """(status, headers of the answer) for a request with these headers."""
    sent = []

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {
        "type": kind,
        "method": method,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(guard.Guard(inner, hosts)(scope, None, send))
    return sent[0].get("status", sent[0].get("code")), dict(sent[0].get("headers", []))


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:7860", "127.0.0.1:1", "[::1]:7860"])
def test_own_names_pass(host):
    status, headers = passed(host=host)
    assert status == 200
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert b"frame-ancestors 'self'" in headers[b"content-security-policy"]


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil:80", "[::2]:1"])
def test_foreign_names_are_refused_for_every_method(host):
    assert passed(host=host)[0] == 400
    assert passed(host=host, method="GET")[0] == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
def test_other_sites_may_look_but_not_act(headers):
    assert passed(host="localhost:7860", **headers)[0] == 403
    assert passed(host="localhost:7860", method="GET", **headers)[0] == 200


def test_own_site_acts():
    assert passed(host="localhost:7860", origin="http://localhost:7860", sec_fetch_site="same-origin")[0] == 200


def test_foreign_websockets_are_closed():
    assert passed(host="localhost:7860", kind="websocket", origin="http://evil.example")[0] == 1008


def test_guessing_is_slowed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    log_in = guard.LogIn("me", "a long password")
    assert log_in("me", "a long password")
    assert not log_in("you", "a long password")
    for _ in range(guard.MAX_WRONG):
        assert not log_in("me", "guess")
    assert not log_in("me", "a long password"), "guessing was not stopped"
    now[0] += guard.WITHIN_SECONDS + 1
    assert log_in("me", "a long password")
    assert not log_in("mé", "ünïcode")


# Limits, and what other sites see


def test_visitors_have_smaller_limits_and_a_budget_of_time(no_password, monkeypatch):
    own = app.parse_arguments([])
    assert (own.max_pixels, own.max_steps, own.max_images, own.max_seconds) == app.OWN_LIMITS and own.private
    monkeypatch.setenv(app.PASSWORD, "12345678")
    other = app.parse_arguments(["--host", "0.0.0.0", "--user", "me", "--max-images", "2"])
    assert (other.max_pixels, other.max_steps, other.max_images, other.max_seconds) == (1024 * 1024, 100, 2, 300)
    assert not other.private
    assert app.make_engine(other).limits.seconds == 300 and app.make_engine(own).limits.seconds == float("inf")


def test_a_space_is_for_visitors(no_password, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "someone/attngen")
    assert not app.parse_arguments([]).private


def test_tools_for_language_models_need_their_package(no_password, capsys, monkeypatch):
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    assert "gradio[mcp]" in refusal(capsys, "--mcp")


def test_a_link_shows_the_project(tmp_path):
    gradios = (
        b'<head><meta property="og:title" content="Gradio" />\n<meta\nname="twitter:title" content="Gradio" /></head>'
    )
    (tmp_path / "card.png").write_bytes(b"picture")
    sent = []

    async def page(scope, receive, send):
        headers = [(b"content-type", b"text/html"), (b"content-length", b"%d" % len(gradios))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": gradios[:40], "more_body": True})
        await send({"type": "http.response.body", "body": gradios[40:]})

    async def keep(message):
        sent.append(message)

    def ask(path, host):
        sent.clear()
        scope = {"type": "http", "method": "GET", "path": path, "scheme": "http", "headers": [(b"host", host)]}
        asyncio.run(Card(page, tmp_path / "card.png")(scope, None, keep))
        return dict(sent[0]["headers"])[b"content-length"], sent[1]["body"]

    length, body = ask("/", b"localhost:7860")
    assert b"Gradio" not in body and b'og:image" content="http://localhost:7860/card.png"' in body
    assert int(length) == len(body)
    assert b'"><script>' not in ask("/", b'x"><script>')[1]
    assert ask("/card.png", b"localhost")[1] == b"picture"
    assert ask("/other", b"localhost")[1] == gradios[:40]
