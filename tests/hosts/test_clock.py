"""The clock against the noise that each scheduler of diffusers adds, measured on constants.

Long because it has a row for every scheduler and each of its options that changes timesteps or sigmas.
"""

import copy
import gc
import importlib
import inspect
import math
import pickle
import sys
import types
import weakref
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import schedulers

from attngen import InterpolantScheduler, SiTPipeline, SiTTransformer2DModel
from attngen.hosts import clock as module
from attngen.hosts.clock import Clock
from attngen.schedule import stage_at

STARTS = (1.0, 0.66, 0.33)


def clamped(time):
    return min(1.0, max(0.0, time))


def by_steps(timestep):
    return clamped(timestep / 1000)


def by_fraction(timestep):
    return clamped(timestep)


def data_at_one(timestep):
    return clamped(1 - timestep)


def steps_to_data(timestep):
    return clamped(1 - timestep / 1000)


FAMILY_CLOCKS = (by_steps, by_fraction, data_at_one, steps_to_data)

# Schedulers whose times are the family's, with the reason.
DEFAULT = {
    "AmusedScheduler": "masks image tokens: no Gaussian noise",
    "VQDiffusionScheduler": "masks image tokens",
    "BlockRefinementScheduler": "text tokens",
    "DiscreteDDIMScheduler": "text tokens",
    "EntropyBoundScheduler": "text tokens",
    "ConsistencyDecoderScheduler": "one or two fixed steps of a decoder",
    "DDPMWuerstchenScheduler": "the timestep is the training time in [0, 1]",
    "IPNDMScheduler": "the timestep is the training time in [0, 1]",
    "ScoreSdeVpScheduler": "the timestep is the training time in [0, 1]",
    "SCMScheduler": "its pipeline passes sin / (sin + cos), the share of the noise",
    "RFD4ProteinaScheduler": "the timestep is the share of the data in flow matching",
    "KarrasVeScheduler": "its pipeline passes half a sigma raised at random, no timestep",
    "ScoreSdeVeScheduler": "its pipeline passes sigma, no timestep",
}
ARGUMENTS = {
    "AmusedScheduler": {"mask_token_id": 7},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "HeliosScheduler": {"stages": 1, "stage_range": [0, 1]},
    "HeliosDMDScheduler": {"stages": 1, "stage_range": [0, 1]},
}
STEPS = {
    "ConsistencyDecoderScheduler": {"num_inference_steps": 2},
    "RFD4ProteinaScheduler": {"num_inference_steps": 20},
    "SCMScheduler": {"num_inference_steps": 2},
    "MiniMaxH3Scheduler": {"num_inference_steps": 60},  # its shift of 12 leaves the last of 10 steps at 0.6
}
# Schedulers with no `add_noise` or `scale_noise` that works.
NO_NOISE = {
    "DDIMInverseScheduler",
    "HeliosScheduler",
    "LTXEulerAncestralRFScheduler",
    "PiflowScheduler",
    "RePaintScheduler",
}
# Every second of their calls is between two sigmas, where `add_noise` gives one of these.
MIDPOINTS = {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"}

NAMES = sorted(
    name
    for name in dir(schedulers)
    if name.endswith("Scheduler") and inspect.isclass(getattr(schedulers, name)) and name != "SchedulerMixin"
)
FLOW_SHIFTED = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LONG = {"num_train_timesteps": 4000, "beta_start": 0.000025, "beta_end": 0.005}
ZERO_SNR = {**LATENT, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
CONTINUOUS = {**LATENT, "timestep_type": "continuous", "prediction_type": "v_prediction"}
DYNAMIC = {"use_dynamic_shifting": True}
VARIANTS = [
    # continuous timesteps: 0.25 · log sigma
    ("EulerDiscreteScheduler", CONTINUOUS, {}),
    ("EulerDiscreteScheduler", {**CONTINUOUS, "use_karras_sigmas": True}, {}),
    # Stable Video Diffusion: half of the steps have more noise than the last training step
    (
        "EulerDiscreteScheduler",
        {**CONTINUOUS, "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0},
        {"num_inference_steps": 25},
    ),
    ("EulerDiscreteScheduler", {**LATENT, "interpolation_type": "log_linear"}, {}),
    ("EulerDiscreteScheduler", LATENT, {"num_inference_steps": None, "sigmas": [14, 8, 4, 2, 1, 0.5, 0.2, 0.05, 0]}),
    ("EulerDiscreteScheduler", {**LATENT, "timestep_spacing": "trailing"}, {"num_inference_steps": 4}),
    ("EulerDiscreteScheduler", LONG, {}),
    ("EulerDiscreteScheduler", {**LATENT, "final_sigmas_type": "sigma_min"}, {}),
    *(
        (name, {**LATENT, option: True}, {"num_inference_steps": 12})
        for name in (
            "DPMSolverMultistepScheduler",
            "DPMSolverSDEScheduler",
            "DPMSolverSinglestepScheduler",
            "DEISMultistepScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "LMSDiscreteScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        )
        for option in ("use_karras_sigmas", "use_exponential_sigmas")
    ),
    *(
        (name, FLOW_SHIFTED, {})
        for name in (
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        )
    ),
    ("UniPCMultistepScheduler", {**FLOW_SHIFTED, "use_karras_sigmas": True}, {}),
    ("UniPCMultistepScheduler", {**FLOW_SHIFTED, "num_train_timesteps": 4000}, {}),
    ("DPMSolverMultistepScheduler", {**LATENT, "final_sigmas_type": "sigma_min"}, {}),
    ("DPMSolverMultistepScheduler", {**LATENT, "use_lu_lambdas": True}, {}),
    *((name, ZERO_SNR, {}) for name in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler")),
    *((name, ZERO_SNR, {}) for name in ("EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler")),
    *((name, LATENT, {"num_inference_steps": 4}) for name in ("LCMScheduler", "TCDScheduler")),
    *((name, LONG, {}) for name in ("DDPMScheduler", "DDIMScheduler", "UniPCMultistepScheduler")),
    ("DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, {"num_inference_steps": 50}),
    ("RePaintScheduler", {}, {"jump_length": 20}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential"}, {}),
    ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}, {}),
    ("EDMDPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, {"num_inference_steps": 30}),
    *(
        (name, options, extra)
        for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
        for options, extra in (
            ({"shift": 3.0}, {}),
            ({"shift": 3.0}, {"num_inference_steps": 4}),
            ({"num_train_timesteps": 4000}, {}),
            ({"num_train_timesteps": 1}, {"sigmas": np.linspace(1, 0.1, 10)}),
            ({"shift_terminal": 0.1}, {}),
            (DYNAMIC, {"mu": 1.15}),
            ({**DYNAMIC, "time_shift_type": "linear"}, {"mu": 2.0}),
            ({"use_karras_sigmas": True}, {}),
            ({"use_exponential_sigmas": True}, {}),
            # CogView4: the model receives the timesteps as they are, the sigmas are shifted
            (DYNAMIC, {"mu": 1.15, "sigmas": np.linspace(1, 0.1, 10), "timesteps": np.linspace(1000, 100, 10)}),
        )
    ),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {}),
    ("LTXEulerAncestralRFScheduler", {}, {"num_inference_steps": None, "sigmas": [1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0]}),
]


class Pipe:
    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.clock = Clock(self)


def scheduler_class(name, monkeypatch):
    """The class, without the packages that only its `step` needs where they are not installed."""
    cls = getattr(schedulers, name)
    files = {
        "CosineDPMSolverMultistepScheduler": "scheduling_cosine_dpmsolver_multistep",
        "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde",
        "LMSDiscreteScheduler": "scheduling_lms_discrete",
    }
    if name not in files or "dummy" not in cls.__module__:
        return cls
    for package in ("scipy", "torchsde"):
        monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(integrate=None))
    path = f"diffusers.schedulers.{files[name]}"
    cls = getattr(importlib.import_module(path), name)
    monkeypatch.delitem(sys.modules, path)
    return cls


@pytest.fixture
def made(monkeypatch):
    def make(name, options=None, extra=None):
        scheduler = scheduler_class(name, monkeypatch)(**{**ARGUMENTS.get(name, {}), **(options or {})})
        wanted = {"num_inference_steps": 10, **STEPS.get(name, {}), **(extra or {})}
        scheduler.set_timesteps(**{key: value for key, value in wanted.items() if value is not None})
        return scheduler

    return make


def family_clock(scheduler):
    return data_at_one if type(scheduler).__name__ == "MiniMaxH3Scheduler" else by_steps


def times_of(scheduler):
    clock, default = Clock(scheduler), family_clock(scheduler)
    return [clock.time(float(step), default) for step in scheduler.timesteps]


def noise_over_data(scheduler, step):
    """Coefficient of the noise and of the data in a sample at a step, as the scheduler mixes them."""
    scheduler, step = copy.deepcopy(scheduler), step.reshape(1)
    ones, zeros = torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1)

    def mix(data, noise):
        scheduler._step_index = None
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(data, step, noise).item()
        more = (scheduler.sigmas, scheduler.timesteps) if type(scheduler).__name__ == "HeliosDMDScheduler" else ()
        return scheduler.add_noise(data, noise, step, *more).item()

    return mix(zeros, ones), mix(ones, zeros)


def wanted_time(scheduler, noise, data):
    """The time by its definition: a table is searched, where the clock interpolates."""
    if noise + data == pytest.approx(1, abs=1e-5):
        return noise
    bars = getattr(scheduler, "alphas_cumprod", None)
    if bars is None:
        bars = diffusers.DDPMScheduler(1000, **LATENT).alphas_cumprod
    angles = torch.atan2((1 - bars).sqrt(), bars.sqrt())
    return int((angles - math.atan2(noise, data)).abs().argmin()) / len(bars)


def check_times(scheduler):
    """Times fall from noise to data and reach all stages; returns them."""
    times = times_of(scheduler)
    rises = "Inverse" in type(scheduler).__name__
    falling = times[::-1] if rises else times
    assert all(0 <= time <= 1 for time in times)
    assert all(later <= earlier + 1e-3 for earlier, later in zip(falling, falling[1:], strict=False)), times
    if type(scheduler).__name__ in ("KDPM2DiscreteScheduler", "DPMSolverSDEScheduler"):
        assert all(later < earlier for earlier, later in zip(times, times[1:], strict=False)), times
    assert falling[0] >= 0.85 and falling[-1] <= 0.26, times
    assert [stage_at(STARTS, time) for time in falling][0] == 0
    assert {stage_at(STARTS, time) for time in times} == {0, 1, 2}
    return times


def check_noise(scheduler, times):
    every = 2 if type(scheduler).__name__ in MIDPOINTS else 1
    for step, time in list(zip(scheduler.timesteps, times, strict=True))[::every]:
        wanted = wanted_time(scheduler, *noise_over_data(scheduler, step))
        assert time == pytest.approx(wanted, abs=0.02), step


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DEFAULT])
def test_every_scheduler(name, made):
    scheduler = made(name)
    times = check_times(scheduler)
    if name in NO_NOISE:
        with pytest.raises((AttributeError, NotImplementedError)):
            noise_over_data(scheduler, scheduler.timesteps[0])
    else:
        check_noise(scheduler, times)


@pytest.mark.parametrize("name, options, extra", VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_option(name, options, extra, made):
    scheduler = made(name, options, extra)
    times = check_times(scheduler)
    if name not in NO_NOISE:
        check_noise(scheduler, times)


@pytest.mark.parametrize("name", DEFAULT)
def test_schedulers_that_keep_the_clock_of_the_family(name, made):
    scheduler = made(name, extra={"temperature": (2, 0)} if name == "AmusedScheduler" else None)
    for step in scheduler.timesteps.tolist():
        for default in FAMILY_CLOCKS:
            assert Clock(scheduler).time(step, default) == default(step)


# What pipelines make of a timestep: the family's clock, and the value for (timestep, training steps).
PASSED = {
    "as it is": (by_steps, lambda step, steps: step),
    "one less": (by_steps, lambda step, steps: step - 1),  # GLM-Image
    "whole": (by_steps, lambda step, steps: step.long()),
    "over 1,000": (by_fraction, lambda step, steps: step / 1000),
    "over the training steps": (by_fraction, lambda step, steps: step / steps),
    "1 minus that over 1,000": (data_at_one, lambda step, steps: 1 - step / 1000),
    "1 minus that over the training steps": (data_at_one, lambda step, steps: 1 - step / steps),
    "the training steps minus that": (steps_to_data, lambda step, steps: steps - step),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("passed", PASSED)
@pytest.mark.parametrize(
    "name, options",
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "num_train_timesteps": 4000}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", FLOW_SHIFTED),
        ("DPMSolverMultistepScheduler", {**LATENT, "use_karras_sigmas": True}),
    ],
)
def test_every_form_of_a_timestep(name, options, passed, dtype, made):
    scheduler, (default, convert) = made(name, options, {"num_inference_steps": 20}), PASSED[passed]
    clock, wanted = Clock(scheduler), times_of(scheduler)
    for index, step in enumerate(scheduler.timesteps):
        scheduler._step_index = index or None
        given = convert(step.to(dtype), scheduler.config.num_train_timesteps).item()
        assert clock.time(given, default) == pytest.approx(wanted[index], abs=0.01), step


def sdxl(scheduler):
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    none: Any = None
    pipe = diffusers.StableDiffusionXLPipeline(vae, none, none, none, none, unet, scheduler, add_watermarker=False)
    text = {"prompt_embeds": torch.zeros(1, 4, 16), "pooled_prompt_embeds": torch.zeros(1, 16)}
    return pipe, unet, {**text, "guidance_scale": 1.0, "height": 16, "width": 16}


def flux(scheduler):
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        )
        text = {"prompt_embeds": torch.zeros(1, 4, 16), "pooled_prompt_embeds": torch.zeros(1, 16)}
    finally:
        torch.set_default_dtype(torch.float32)
    none: Any = None
    pipe = diffusers.FluxPipeline(scheduler, none, none, none, none, none, transformer)
    return pipe, transformer, {**text, "height": 32, "width": 32}


def sit(scheduler):
    transformer = SiTTransformer2DModel(4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=4)
    return SiTPipeline(transformer, scheduler), transformer, {"class_labels": [1]}


@pytest.mark.parametrize(
    "make, default, scheduler",
    [
        (sdxl, by_steps, diffusers.EDMEulerScheduler()),
        (sdxl, by_steps, diffusers.EulerDiscreteScheduler(**CONTINUOUS, use_karras_sigmas=True)),
        (sdxl, by_steps, diffusers.DDIMScheduler(**LONG)),
        (sdxl, by_steps, diffusers.KDPM2DiscreteScheduler(**LATENT)),
        (flux, by_fraction, diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
        (flux, by_fraction, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=4000)),
        (flux, by_fraction, diffusers.UniPCMultistepScheduler(**FLOW_SHIFTED)),
        (sit, data_at_one, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
        (sit, data_at_one, diffusers.FlowMatchHeunDiscreteScheduler()),
        (sit, data_at_one, InterpolantScheduler(sampler="ode")),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_pipelines_pass(make, default, scheduler):
    pipe, model, arguments = make(scheduler)
    clock, times = Clock(pipe), []

    def hook(module, args, kwargs):
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        times.append(clock.time(torch.as_tensor(timestep).flatten()[0].item(), default))

    model.register_forward_pre_hook(hook, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    pipe(**arguments, num_inference_steps=10, output_type="latent")
    if isinstance(scheduler, InterpolantScheduler):
        wanted = [1 - time for time in scheduler.timesteps.tolist()]
    else:
        wanted = times_of(scheduler)
    assert times == pytest.approx(wanted, abs=1e-6)
    assert {stage_at(STARTS, time) for time in times} == {0, 1, 2}


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
@pytest.mark.parametrize("steps, default", [(1000, steps_to_data), (1, data_at_one)], ids=["mochi", "omnigen"])
def test_inverted_sigmas(name, steps, default, made):
    """Their timesteps grow from noise, 0, to data, and the model receives them as they are."""
    options = {"invert_sigmas": True, "shift": 3.0, "num_train_timesteps": steps}
    scheduler = made(name, options, {"sigmas": np.linspace(1, 0.1, 10)})
    plain = made(name, {"shift": 3.0}, {"sigmas": np.linspace(1, 0.1, 10)})
    times = [Clock(scheduler).time(step, lambda step: 0.9999 * default(step)) for step in scheduler.timesteps.tolist()]
    assert times == pytest.approx(times_of(plain), abs=1e-6)  # by the schedule: the clock above is a little off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timesteps_that_are_no_training_steps_pass_as_they_are(dtype, made):
    """Cosmos reads EDM's 0.25 · log sigma by a clock of fractions."""
    scheduler = made("EDMEulerScheduler", extra={"num_inference_steps": 35})
    clock, steps = Clock(scheduler), scheduler.timesteps.to(dtype).tolist()
    assert [clock.time(step, by_fraction) for step in steps] == pytest.approx(times_of(scheduler), abs=1e-6)


def test_a_pyramid_keeps_the_clock_of_the_family(made):
    """Each stage of Helios counts its sigmas from 1 to 0, its timesteps from that of the whole run."""
    scheduler = diffusers.HeliosScheduler()
    for stage in range(3):
        scheduler.set_timesteps(10, stage_index=stage)
        for step in scheduler.timesteps.tolist():
            assert Clock(scheduler).time(step, by_steps) == by_steps(step)


def test_cosmos_keeps_the_clock_of_the_family():
    """Its sigmas fall from 80, and its pipeline passes sigma / (sigma + 1), the share of the noise."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002)
    scheduler.set_timesteps(sigmas=np.linspace(0, 1, 35))
    assert scheduler.sigmas[0] == 80
    for sigma in scheduler.sigmas.tolist():
        share = sigma / (sigma + 1)
        assert Clock(scheduler).time(share, by_fraction) == share


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_interpolants_keep_the_clock_of_the_family(path):
    scheduler = InterpolantScheduler(path=path)
    scheduler.set_timesteps(10)
    for step in scheduler.timesteps.tolist():
        assert Clock(scheduler).time(step, data_at_one) == 1 - step


def test_stages_of_edm_on_a_latent_model(made):
    """By the timestep over 1,000 alone all ten steps are in the last stage."""
    scheduler = made("EDMEulerScheduler")
    steps = scheduler.timesteps.tolist()
    assert {stage_at(STARTS, by_steps(step)) for step in steps} == {2}
    assert [stage_at(STARTS, Clock(scheduler).time(step, by_steps)) for step in steps] == [0] * 5 + [1] + [2] * 4


def test_values_that_are_not_on_the_schedule(made):
    scheduler = made("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"num_inference_steps": 4})
    clock = Clock(scheduler)  # timesteps 1000, 858, 602, 9
    for value in (930.0, 700.0, 300.0, -50.0, 1200.0, math.inf, -math.inf):
        assert clock.time(value, by_steps) == by_steps(value)
    assert clock.time(0.7, by_fraction) == 0.7
    assert clock.time(0.3, data_at_one) == 0.7
    # A clock of another kind is taken as it is, even on the schedule.
    assert clock.time(1000.0, lambda step: 0.25) == 0.25
    assert clock.time(0.8579, lambda step: step**2) == 0.8579**2


@pytest.mark.parametrize("name", ["DDPMScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_training_loop(name):
    """All training steps are on the schedule before `set_timesteps`; there the clock is the plain one."""
    scheduler = getattr(diffusers, name)()
    for step in (1.0, 17.0, 500.0, 731.0, 999.0):
        assert Clock(scheduler).time(step, by_steps) == pytest.approx(step / 1000, abs=1e-6)


def test_without_a_schedule():
    class Odd:
        timesteps = "none"
        sigmas = property(lambda self: None)
        config = None

    half_made = types.SimpleNamespace(
        timesteps=torch.tensor([3.0, 2.0]), sigmas=torch.tensor([9.0, 1.0, 0.0]), config=None
    )
    for source in (None, Odd(), types.SimpleNamespace(), Pipe(None)):
        for default in FAMILY_CLOCKS:
            assert Clock(source).time(0.5, default) == default(0.5)
    assert 0 < Clock(half_made).time(2.0, by_steps) < 1  # sigmas alone are enough
    half_made.timesteps = torch.empty(2, device="meta")
    assert Clock(half_made).time(2.0, by_steps) == 0.002
    assert Clock(diffusers.LTXEulerAncestralRFScheduler()).time(500.0, by_steps) == 0.5  # its timesteps are None


@pytest.mark.parametrize("source", [None, diffusers.DDIMScheduler()])
def test_nan_is_refused(source):
    with pytest.raises(ValueError, match="NaN"):
        Clock(source).time(math.nan, lambda step: 0.5)


def test_the_scheduler_is_read_at_each_call(made):
    pipe = Pipe(made("DDIMScheduler", {"num_train_timesteps": 4000, **LATENT}))
    clock = Clock(pipe)
    assert clock.time(3600.0, by_steps) == pytest.approx(0.9)
    pipe.scheduler = made("EDMEulerScheduler")
    assert clock.time(pipe.scheduler.timesteps[3].item(), by_steps) == pytest.approx(0.928, abs=1e-3)
    pipe.scheduler = made("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    assert clock.time(650.0, by_steps) == 0.65
    pipe.scheduler.set_timesteps(sigmas=[0.9, 0.4])  # timesteps 964 and 667
    assert clock.time(667.0, by_steps) == pytest.approx(2 / 3)
    pipe.scheduler.sigmas[1] = 0.5
    assert clock.time(667.0, by_steps) == 0.5
    pipe.scheduler.set_timesteps(sigmas=[1.0005, 0.4])
    assert clock.time(pipe.scheduler.timesteps[0].item(), by_steps) == 1.0
    with torch.inference_mode():
        pipe.scheduler.set_timesteps(4)
        assert clock.time(858.0, by_steps) == pytest.approx(0.858, abs=1e-3)


def test_a_schedule_is_read_once(made, monkeypatch):
    calls = []
    numbers = module._numbers
    monkeypatch.setattr(module, "_numbers", lambda values: calls.append(1) or numbers(values))
    scheduler = made("UniPCMultistepScheduler")
    clock = Clock(scheduler)
    for step in scheduler.timesteps.tolist() * 3:
        clock.time(step, by_steps)
    read = len(calls)
    assert 0 < read <= 3  # timesteps, sigmas, alphas_cumprod
    scheduler.set_timesteps(10)
    clock.time(999.0, by_steps)
    assert len(calls) == 2 * read


def test_a_pipeline_is_held_weakly(made):
    pipe = Pipe(made("EDMEulerScheduler"))
    clock, alive = Clock(pipe), weakref.ref(pipe)
    clock.time(0.5, by_steps)
    del pipe
    gc.collect()
    assert alive() is None
    assert clock.scheduler is None and clock.time(500.0, by_steps) == 0.5


def test_copies(made):
    pipe = Pipe(made("EDMEulerScheduler"))
    step = pipe.scheduler.timesteps[5].item()
    wanted = pipe.clock.time(step, by_steps)
    assert wanted > 0.4
    copied = copy.deepcopy(pipe)
    assert copied.clock.scheduler is copied.scheduler is not pipe.scheduler
    assert copied.clock.time(step, by_steps) == wanted
    assert copy.deepcopy(pipe.clock).scheduler is pipe.scheduler
    assert pickle.loads(pickle.dumps(pipe.clock)).time(500.0, by_steps) == 0.5
    alone = Clock(pipe.scheduler)
    for other in (copy.deepcopy(alone), pickle.loads(pickle.dumps(alone))):
        assert other.scheduler is not pipe.scheduler and other.time(step, by_steps) == wanted
