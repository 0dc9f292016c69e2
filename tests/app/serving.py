"""What the tests of the page share: the served page, a Chromium, and what happens on a page that must be quiet."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 300  # of a loaded machine
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


PAGE = (str(ROOT / "app.py"),)
FAULTY = ("-m", "tests.app.faulty")  # the same page with a model that fails for these two seeds
OUT_OF_MEMORY, NOT_FINITE = 770_001, 770_002
SLOW_MODEL = "slow/model"  # loads there for ever
FIRST_MODEL = "emoji-128"
# A message in the corner leaves by itself after some seconds, on a busy machine before a test has looked.
KEEP_MESSAGES = """
window.messagesShown = [];
new MutationObserver(() => {
    for (const body of document.querySelectorAll("[data-testid=toast-body]")) {
        if (!window.messagesShown.includes(body.innerText)) window.messagesShown.push(body.innerText);
    }
}).observe(document, {childList: true, subtree: true, characterData: true});
"""
POLLING = 200  # ms; by default a condition is looked at in every frame, which costs more than the page


class Server:
    """The page in a process of its own, at one address however often it is started.

    Args:
        folder: for pictures.
        log: file for what it prints.
    """

    def __init__(self, folder, log):
        self.folder, self.log = Path(folder), Path(log)
        self.address = None
        self.program = None
        self._process = None

    def start(self, program=PAGE):
        """Run it as people do, the first time on a free port."""
        port = self.address.rsplit(":", 1)[1] if self.address else "0"
        command = [sys.executable, *program, "--port", port, "--out", str(self.folder), "--threads", "1"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.log, "wb") as output:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        self.program, self.address = program, self._wait()

    def _wait(self):
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            if found := re.search(r"http://[^\s/]+", self.log.read_text(errors="replace")):
                return found[0]
            time.sleep(0.2)
        raise AssertionError(f"the page did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def kill(self):
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    def stop(self):
        """End it as people do."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


class Visit:
    """One open page, with what it asked for and what went wrong in it.

    Args:
        browser: of playwright.
        address: of the server.
        path: what follows the address.
        width: of the window in pixels.
        height: likewise.
    """

    def __init__(self, browser, address, path="/", width=1280, height=900):
        self.context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.add_init_script(KEEP_MESSAGES)
        self.faults, self.foreign = [], []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("response", lambda got: got.status >= 400 and self.faults.append(f"{got.status} {got.url}"))
        self.page.on("request", lambda sent: self._is_foreign(sent.url, address) and self.foreign.append(sent.url))
        self.page.goto(address + path)
        self.wait_until_filled()

    def wait_until_filled(self):
        """Wait until the page stands and what the browser kept of the form is back in it."""
        self.page.wait_for_selector("#generate")
        self.page.wait_for_function("window.attngenRemembers")

    @staticmethod
    def _is_foreign(url, address):
        return not url.startswith((address, "data:", "blob:"))

    def reset(self, steps):
        """The form of a page that was used before, as on a new one, but for the number of steps."""
        self.page.set_viewport_size({"width": 1280, "height": 900})
        self.show("Generate")
        self.open_details()
        if self.page.input_value("#model input") != FIRST_MODEL:
            self.choose("model", FIRST_MODEL)
            self.wait_for("Ready")
        self.choose("label", "face")
        self.page.check("#method input[value=none]")
        self.page.check("#new-seed input")
        for name, value in (("steps", steps), ("images", 1), ("width", 128), ("height", 128)):
            self.set(name, value)

    def show(self, tab):
        """Go to a tab."""
        self.page.get_by_role("tab", name=tab).click()

    def press(self, button, status="status"):
        """Press a button that starts something, and forget what was said before."""
        self.page.evaluate("name => { document.querySelector(`#${name} textarea`).value = ''; }", status)
        self.page.click(f"#{button}")

    def recall(self, path):
        """Give the page a picture, as if it were dropped there."""
        self.page.evaluate("document.querySelector('#status textarea').value = ''")
        self.page.set_input_files("#more > input[type=file]", path)

    def status(self, name="status"):
        """The text of a status line."""
        return self.page.input_value(f"#{name} textarea")

    def toast(self, words):
        """Wait until a message with these words has been in the corner, and put away what is still there."""
        self.page.wait_for_function(
            "words => window.messagesShown.some(text => text.includes(words))", arg=words, polling=POLLING
        )
        self.page.evaluate("document.querySelectorAll('[data-testid=toast-close]').forEach(button => button.click())")
        self.page.locator("[data-testid=toast-body]").first.wait_for(state="detached")
        self.page.evaluate("window.messagesShown.length = 0")

    def wait_for(self, start, name="status", seconds=120):
        """Wait until a status line starts with a text; returns the line."""
        self.page.wait_for_function(
            "([name, start]) => document.querySelector(`#${name} textarea`).value.startsWith(start)",
            arg=[name, start],
            timeout=seconds * 1000,
            polling=POLLING,
        )
        return self.status(name)

    def set(self, name, value):
        """Type a number into a field."""
        field = self.page.locator(f"#{name} input[type=number]").first
        field.fill(str(value))
        field.blur()

    def choose(self, name, value):
        """Type into a list of choices."""
        self.page.locator(f"#{name} input").fill(value)
        self.page.keyboard.press("Enter")

    def open_details(self):
        """Unfold size, steps and seed."""
        if not self.page.is_visible("#steps input[type=number]"):
            self.page.locator("#details button").first.click()
            self.page.wait_for_selector("#steps input[type=number]", state="visible")

    def overflow(self):
        """Pixels that the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def check(self):
        """Nothing may have gone wrong, and no other host may have been asked."""
        assert not self.foreign, f"other hosts were asked: {self.foreign}"
        assert not self.faults, f"faults on the page: {self.faults}"


class Pages:
    """The page that tests share, for opening one takes seconds; after a failure they get a new one."""

    def __init__(self, browser, address):
        self.browser, self.address = browser, address
        self.visit = None

    def open(self, path="/", width=1280, height=900):
        """A new page."""
        return Visit(self.browser, self.address, path, width, height)

    def shared(self):
        """The page that is open."""
        self.visit = self.visit or self.open()
        return self.visit

    def close(self):
        """Close the shared page."""
        if self.visit is not None:
            self.visit.context.close()
            self.visit = None
