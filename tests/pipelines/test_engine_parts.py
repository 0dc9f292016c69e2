"""The engine's small parts: counts over time, previews, sizes of memory, calls, the guard of the page."""

import asyncio

import numpy as np
import pytest
import torch

from pipelines.cli import UserError
from pipelines.engine.memory import is_out_of_memory
from pipelines.engine.previews import Previewer, colours_of, noise_scales
from pipelines.guard import Guard, LogIn, is_loopback
from pipelines.methods.catalogue import METHODS
from pipelines.methods.counts import count_parts, counts_text, draw_parts, parse_counts
from pipelines.methods.uses import Use, parse_use, timeline
from tests.builders.programs import build_sit


def test_counts_are_read_and_written():
    for text in ("16", "1:4,0.5:16,0.2:64"):
        assert counts_text(*parse_counts("agents", text)) == text
    assert parse_counts("agents", 16) == ((1.0,), (16,))
    assert parse_counts("agents", " 1:4, 0.5:0 ", least=0) == ((1.0, 0.5), (4, 0))


@pytest.mark.parametrize("bad", ["", "x", "0", "-4", "0.5:4", "1:4,1:5", "1:4,0.2:5,0.5:6", "1:4,-1:5", "1:1.5", True,
                                 "1:4," * 20 + "0.1:4", "inf:4", "99999999"])  # fmt: skip
def test_bad_counts_are_refused(bad):
    with pytest.raises(UserError, match="agents"):
        parse_counts("agents", bad)


def test_uses_are_read_from_words():
    assert parse_use("agent 64").options["num_agents"] == "64"
    assert parse_use("agent num_agents=1:64,0.3:0 min_tokens=256").options["min_tokens"] == 256
    for use in (parse_use("agent 64 min_tokens=0"), parse_use("tome ratio=0.25"), parse_use("none")):
        assert parse_use(use.text) == use
    for same in (
        "num_agents=1:64,0.3:0 min_tokens=0",
        "1:64,0.3:0  min_tokens=0",
        "num_agents=1:64,0.3:0,min_tokens=0",
    ):
        for sign in (" ", ":", " : "):
            use = parse_use(f" agent{sign}{same}")
            assert use.options["num_agents"] == "1:64,0.3:0" and use.options["min_tokens"] == 0
    for bad in (
        "",
        "magic",
        "none 4",
        "tome ratio=x",
        "agent num_agents=4 words",
        "agent 4 num_agents=8",
        "agent agents=4",
        "tome random=maybe",
        "tome:=1",
    ):
        with pytest.raises(UserError):
            parse_use(bad)


def test_timeline_pictures():
    for name, info in METHODS.items():
        if name != "plan":
            parts = timeline(Use(name).checked())
            assert parts[0].start == 1 and draw_parts(parts, info.title).size == (640, 150)
    few, many = count_parts((1.0, 0.5), (4, 64), "agents")
    assert few.level < many.level == 1
    exact = count_parts((1.0, 0.5), (4, 0), "agents")[1]
    assert exact.exact and exact.label == "exact"
    bars = np.asarray(draw_parts([few, many], "x").convert("L"))
    left, right = (bars[36:120, 60:300] < 140).sum(), (bars[36:120, 340:600] < 140).sum()
    assert 0 < left < right


def test_preview_shows_where_straight_paths_lead():
    pipe = build_sit()
    pipe.scheduler.set_timesteps(10)
    picture = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    previewer = Previewer(pipe, (16, 16))
    times = [float(t) for t in pipe.scheduler.timesteps]
    shown = None
    for index in (0, 1):
        time = times[index + 1]
        shown = previewer.draw(index, time * picture + (1 - time) * noise)
    assert shown is not None and max(shown.size) == 256
    found = np.asarray(shown.resize((16, 16), 0)) / 255
    assert np.abs(found - (picture[0].permute(1, 2, 0).numpy() / 2 + 0.5)).max() < 0.01


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_noise_scales_are_those_of_the_scheduler(name):
    import diffusers

    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(10)
    scales = [noise_scales(scheduler, index) for index in range(11)]
    assert all(scale is not None for scale in scales)
    noisy = [s / a for a, s in scales]
    assert noisy == sorted(noisy, reverse=True) and noisy[-1] == pytest.approx(0, abs=0.05)
    picture, noise = torch.full((1, 4, 2, 2), 0.5), torch.ones(1, 4, 2, 2)
    if name == "DDIMScheduler":
        made = scheduler.add_noise(picture, noise, scheduler.timesteps[3:4])
        a, s = scales[3]
        assert torch.allclose(made, a * picture + s * noise, atol=1e-5)


def test_colours_are_fitted_on_the_vae():
    class Config:
        scaling_factor, shift_factor = 0.5, 0.1

    class Encoded:
        def __init__(self, mean):
            self.mean = mean

    class Vae(torch.nn.Module):
        """Latents that are a known linear map of the colours."""

        config = Config()

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 1], [1, 1, 1]]))

        def encode(self, x):
            small = torch.nn.functional.interpolate(x, scale_factor=1 / 8, mode="area")
            latents = torch.einsum("oc,bchw->bohw", self.weight, small)
            return type("Output", (), {"latent_dist": Encoded(latents)})()

    vae = Vae()
    matrix = colours_of(vae)
    assert matrix is not None
    assert colours_of(vae) is matrix
    red = torch.tensor([1.0, -1, -1])
    latents = ((vae.weight @ red) - 0.1) * 0.5
    assert torch.allclose(torch.cat([latents, torch.ones(1)]) @ matrix, torch.tensor([1.0, 0, 0]), atol=0.15)
    assert colours_of(torch.nn.Linear(1, 1)) is None


def test_out_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


# The guard


async def _ask(guard, method="GET", headers=(), kind="http"):
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}

    scope = {"type": kind, "method": method, "headers": [(k.encode(), v.encode()) for k, v in headers]}
    await guard(scope, receive, send)
    return sent


async def _page(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {"host": "127.0.0.1:7860"}, 200),
        ("GET", {"host": "LOCALHOST"}, 200),
        ("GET", {"host": "[::1]:7860"}, 200),
        ("GET", {"host": "evil.example"}, 400),
        ("GET", {"host": "127.0.0.1.evil.example"}, 400),
        ("GET", {}, 400),
        ("POST", {"host": "127.0.0.1:7860"}, 200),
        ("POST", {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}, 200),
        ("POST", {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:1"}, 403),
        ("POST", {"host": "127.0.0.1:7860", "origin": "http://evil.example"}, 403),
        ("POST", {"host": "127.0.0.1:7860", "origin": "null"}, 403),
        ("POST", {"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site"}, 403),
        ("POST", {"host": "127.0.0.1:7860", "sec-fetch-site": "same-origin"}, 200),
        ("DELETE", {"host": "127.0.0.1:7860", "origin": "null"}, 403),
    ],
)
def test_guard(method, headers, status):
    guard = Guard(_page, hosts=["localhost", "127.0.0.1", "::1"])
    sent = asyncio.run(_ask(guard, method, headers.items()))
    assert sent[0]["status"] == status
    if status == 200:
        names = {name for name, _ in sent[0]["headers"]}
        assert {b"content-security-policy", b"x-content-type-options"} <= names


def test_guard_closes_foreign_websockets():
    sent = asyncio.run(_ask(Guard(_page, hosts=["localhost"]), headers=[("host", "evil.example")], kind="websocket"))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.1.2", "::", "my-host", "")))


def test_log_in_cannot_be_hurried(monkeypatch):
    from pipelines import guard

    now = [1000.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    log_in = LogIn("me", "correct horse")
    assert log_in("me", "correct horse") and not log_in("you", "correct horse")
    for _ in range(9):
        assert not log_in("me", "wrong")
    assert not log_in("me", "correct horse")
    now[0] += 61
    assert log_in("me", "correct horse")
