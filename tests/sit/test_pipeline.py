"""SiTPipeline: guidance, labels, sizes, schedulers, mediators, and what diffusers asks of a pipeline."""

import copy
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from PIL import Image

import attngen
from attngen.schedule import ChangeSchedule, Schedule
from attngen.sit import pipeline as sit_pipeline
from attngen.sit.model import SiTTransformer2DModel
from attngen.sit.pipeline import SiTPipeline
from attngen.sit.scheduler import InterpolantScheduler
from tests.golden_cases import golden_cases, state

NAMES = {0: "cat", 1: "golden retriever, dog", 2: "crane", 3: "crane", 4: "Red Fox"}
NULL = 5
ODE = {"sampler": "ode", "solver": "euler"}


def make_transformer(attention="mediator", seed=0, **config):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SiTTransformer2DModel(
            **{
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 3,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_classes": 5,
                "learn_sigma": False,
                "attention": attention,
                "num_mediators": 4,
                **config,
            }
        )
        for parameter in model.parameters():  # adaLN-Zero starts as the identity, which would test nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_pipe(transformer=None, scheduler=None, vae=None, id2label=NAMES, **options):
    transformer = transformer or make_transformer(**options)
    pipe = SiTPipeline(transformer, scheduler or InterpolantScheduler(**ODE), vae, id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_vae():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.5,
            shift_factor=0.1,
        ).eval()


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents_of(pipe, labels=(0, 1), seeds=(0, 1), num_inference_steps=3, **options):
    options = {"generator": generators(*seeds), "output_type": "latent", **options}
    return pipe(list(labels), num_inference_steps=num_inference_steps, **options).images


@pytest.fixture
def pipe():
    return make_pipe()


@pytest.fixture
def calls(pipe):
    """The keyword arguments of every network call."""
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


class OneCall(InterpolantScheduler):
    """Evaluates the network once, at a chosen time, and returns its prediction as the sample."""

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.tensor([self.only_time])

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        return (model_output,)


# Guidance


@pytest.mark.parametrize("name, tensors, metadata", golden_cases("sit_model_*"))
def test_guidance_of_three_channels_is_the_reference(name, tensors, metadata):
    transformer = SiTTransformer2DModel.from_original(state(tensors), num_attention_heads=4).eval()
    scheduler = OneCall()
    scheduler.only_time = tensors["cfg_t"][0].item()
    pictures = len(tensors["cfg_x"]) // 2
    got = make_pipe(transformer, scheduler, id2label=None)(
        tensors["cfg_y"][:pictures],
        latents=tensors["cfg_x"][:pictures],
        guidance_scale=metadata["cfg_scale"],
        guidance_channels=3,
        output_type="latent",
    ).images
    torch.testing.assert_close(got, tensors["cfg_out"][:pictures], atol=2e-5, rtol=1e-5)


def test_guidance_of_all_channels_is_the_formula(pipe):
    pipe.scheduler = OneCall()
    pipe.scheduler.only_time = 0.4
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    got = pipe([0, 4], latents=x, guidance_scale=2.5, output_type="latent").images
    with torch.no_grad():
        conditional = pipe.transformer(x, 0.4, torch.tensor([0, 4])).sample
        unconditional = pipe.transformer(x, 0.4, torch.tensor([NULL, NULL])).sample
    torch.testing.assert_close(got, unconditional + 2.5 * (conditional - unconditional))
    alone = pipe([0, 4], latents=x, output_type="latent").images
    torch.testing.assert_close(alone, conditional)


def test_guidance_doubles_the_batch_with_the_null_class(pipe, calls):
    latents_of(pipe, guidance_scale=2.0, num_inference_steps=1)
    latents_of(pipe, guidance_scale=1.0, num_inference_steps=1)
    assert calls[0]["class_labels"].tolist() == [NULL, NULL, 0, 1]
    assert torch.equal(*calls[0]["hidden_states"].chunk(2))
    assert calls[1]["class_labels"].tolist() == [0, 1]


def test_guidance_interval_is_in_the_models_time(pipe, calls):
    latents_of(pipe, guidance_scale=2.0, guidance_interval=(0.2, 0.6), num_inference_steps=10)
    batches = {round(call["timestep"][0].item(), 1): len(call["hidden_states"]) for call in calls}
    assert batches == {t / 10: 4 if 2 <= t <= 6 else 2 for t in range(10)}


def test_guidance_without_a_null_class_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(sit_pipeline.logger, "warning", said.append)
    pipe = make_pipe(class_dropout_prob=0.0)
    latents_of(pipe)
    assert not said
    latents_of(pipe, guidance_scale=2.0)
    assert len(said) == 1 and "trained without it (class_dropout_prob=0); pass guidance_scale=1" in said[0]


def test_numpy_numbers_are_numbers(pipe):
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 8, "guidance_channels": 2}
    numbers = {"num_inference_steps": np.int64(2), "guidance_scale": np.float32(2), "height": np.int32(8)}
    numbers |= {"guidance_channels": np.int8(2), "guidance_interval": np.array([0, 1.0], np.float32).tolist()}
    assert torch.equal(latents_of(pipe, **options), latents_of(pipe, **numbers))


def test_a_full_interval_changes_nothing(pipe):
    always = latents_of(pipe, guidance_scale=2.0, guidance_interval=(0, 1))
    assert torch.equal(always, latents_of(pipe, guidance_scale=2.0))
    assert not torch.equal(always, latents_of(pipe, guidance_scale=2.0, guidance_interval=(0.9, 1.0)))


# Labels


@pytest.mark.parametrize(
    "labels, numbers",
    [
        (3, [3]),
        ("cat", [0]),
        (" CAT ", [0]),
        ("golden retriever, dog", [1]),
        ("Dog", [1]),
        (["red fox", 2, "golden retriever"], [4, 2, 1]),
        ([[1], [2]], [1, 2]),
        (torch.tensor([1, 4]), [1, 4]),
        (torch.tensor(4), [4]),
        (np.array([0, 1]), [0, 1]),
        ((np.int64(2),), [2]),
        ([torch.tensor(3), [np.array(1)]], [3, 1]),
    ],
)
def test_labels(pipe, labels, numbers):
    assert pipe.get_label_ids(labels) == numbers


@pytest.mark.parametrize(
    "labels, sentence",
    [
        ("cta", "unknown class 'cta'; nearest: cat; known: cat, golden retriever, crane, crane, Red Fox"),
        ("crane", r"'crane' names several classes: 2 \(crane\), 3 \(crane\); give the number"),
        (5, "class label 5 is out of range; the model's 5 classes are 0 to 4"),
        (-1, "class label -1 is out of range"),
        (1.5, "class_labels must be whole numbers or names, got 1.5"),
        (True, "class_labels must be whole numbers or names, got True"),
        (torch.tensor([0.5]), "class_labels must be whole numbers or names"),
        ([], "class_labels is empty"),
        (None, "class_labels must be whole numbers or names, got None"),
    ],
)
def test_labels_that_cannot_be(pipe, calls, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        pipe(labels)
    assert not calls


def test_a_name_needs_names():
    with pytest.raises(ValueError, match="no names of classes, so 'cat' is unknown; give class numbers"):
        make_pipe(id2label=None)("cat")


def test_a_name_of_a_class_that_the_model_lacks():
    with pytest.raises(ValueError, match="class label 7 is out of range"):
        make_pipe(id2label={7: "cat"})("cat")


def test_many_names_are_not_all_printed():
    names = {number: f"thing {number}" for number in range(1000)}
    pipe = make_pipe(num_classes=1000, id2label=names)
    with pytest.raises(ValueError, match="nearest: thing") as caught:
        pipe("thinh 12")
    assert len(str(caught.value)) < 100
    with pytest.raises(ValueError, match="known are 1000 classes, such as thing 0"):
        pipe("zzz")


# Arguments


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number >= 1, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number >= 1, got 2.5"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number >= 0"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number >= 0"),
        ({"guidance_scale": None}, "guidance_scale must be a finite number"),
        ({"guidance_channels": 4}, "guidance_channels must be a whole number from 1 to 3, got 4"),
        ({"guidance_interval": (0.7, 0.2)}, "guidance_interval must have 0 <= low <= high <= 1"),
        ({"guidance_interval": (0.2, 1.2)}, "guidance_interval must have 0 <= low <= high <= 1"),
        ({"guidance_interval": (0.0, math.nan)}, "guidance_interval must be"),
        ({"guidance_interval": (-0.1, 1.0)}, "guidance_interval must be"),
        ({"guidance_interval": 0.5}, "guidance_interval must be .low, high., got 0.5"),
        ({"height": 16.0}, "height must be a whole number >= 1, got 16.0"),
        ({"height": 15}, "height must be a positive multiple of 2 for this model, got 15; try 14 or 16"),
        ({"height": 0}, "height must be a positive multiple of 2 for this model, got 0; try 2"),
        ({"width": -64}, "width must be a positive multiple of 2"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents must have shape \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"),
        (
            {"latents": torch.zeros(2, 3, 8, 7)},
            r"width \(of the latents, in pixels\) must be a positive multiple of 2 .* got 7; try 6 or 8",
        ),
        ({"latents": torch.zeros(2, 3, 8, 8), "height": 16}, r"latents must have shape \(2, 3, 16, 8\)"),
        ({"latents": torch.zeros(3, 8, 8)}, r"latents must have 4 axes \(B, C, h, w\), got shape \(3, 8, 8\)"),
        ({"generator": generators(1)}, "2 images need 2 generators, got a list of 1"),
        ({"generator": 3}, "generator must be a torch.Generator or a list of them, got int"),
        ({"output_type": "jpeg"}, "unknown output_type 'jpeg'; known: pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs may name"),
        ({"num_mediators": 17}, "num_mediators must be 1 to 16, the 4 x 4 tokens of this image, got 17"),
        ({"num_mediators": 0}, "num_mediators must be 1 to 16"),
        ({"num_mediators": (5, 1)}, r"\(rows, columns\) must fit the 4 x 4 tokens of this image, got \(5, 1\)"),
        ({"num_mediators": "many"}, "num_mediators must be 1 to 16"),
        ({"num_mediators": Schedule((1.0, 0.5), (4, 99))}, "num_mediators must be 1 to 16, .* got 99"),
        ({"num_mediators": ChangeSchedule(values=(4, 9, 99))}, "num_mediators must be 1 to 16, .* got 99"),
        ({"num_mediators": ChangeSchedule()}, "has no values; give it one number of mediators a level"),
    ],
)
def test_arguments_are_refused_before_any_work(pipe, calls, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        pipe([0, 1], **{"num_inference_steps": 2, **arguments})
    assert not calls


def test_more_tokens_take_more_mediators(pipe):
    assert latents_of(pipe, height=12, width=16, num_mediators=48, num_inference_steps=1).shape == (2, 3, 12, 16)


def test_mediators_need_a_model_that_has_them():
    with pytest.raises(ValueError, match="num_mediators was given, but the model has softmax attention"):
        make_pipe(attention="softmax")(0, num_mediators=4)


def test_a_scheduler_of_another_kind_is_refused(pipe):
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler does not fit SiT; use InterpolantScheduler"):
        pipe(0)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="with use_dynamic_shifting=False"):
        pipe(0)


def test_channels_that_are_no_picture():
    pipe = make_pipe(in_channels=5)
    with pytest.raises(ValueError, match="cannot make an image from 5 channels; give the pipeline a vae"):
        pipe(0, num_inference_steps=1)
    assert pipe(0, num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 5)


# Noise


def test_a_picture_does_not_depend_on_its_batch():
    for scheduler in (InterpolantScheduler(), InterpolantScheduler(**ODE)):
        pipe = make_pipe(scheduler=scheduler)
        batch = latents_of(pipe, (0, 1, 4), (7, 8, 9), num_inference_steps=6, guidance_scale=2.0)
        for i, (label, seed) in enumerate(((0, 7), (1, 8), (4, 9))):
            single = latents_of(pipe, [label], [seed], num_inference_steps=6, guidance_scale=2.0)
            torch.testing.assert_close(batch[i : i + 1], single, atol=1e-5, rtol=1e-5)


def test_the_sde_has_noise_of_its_own():
    pipe = make_pipe(scheduler=InterpolantScheduler())
    start = torch.zeros(2, 3, 8, 8)
    first, again = (latents_of(pipe, latents=start, seeds=seeds) for seeds in ((1, 2), (1, 2)))
    other = latents_of(pipe, latents=start, seeds=(1, 3))
    assert torch.equal(first, again) and torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_generators_leave_the_global_state_alone(pipe, global_rng_untouched, sampler):
    pipe.scheduler = InterpolantScheduler(sampler=sampler)
    latents_of(pipe, generator=torch.Generator().manual_seed(0))


def test_training_mode_drops_no_labels(pipe, global_rng_untouched):
    expected = latents_of(pipe)
    pipe.transformer.train()
    assert torch.equal(latents_of(pipe), expected)


def test_given_latents_are_the_start(pipe):
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=g) for g in generators(0, 1)])
    before = noise.clone()
    assert torch.equal(latents_of(pipe, latents=noise), latents_of(pipe))
    assert torch.equal(noise, before)


def test_half_precision_keeps_the_sampler_in_float32(pipe):
    expected = latents_of(pipe, num_inference_steps=20)
    pipe.to(torch.bfloat16)
    seen = []

    def watch(pipe, index, timestep, kwargs):
        seen.append(kwargs["latents"].dtype)

    got = latents_of(pipe, num_inference_steps=20, callback_on_step_end=watch)
    assert set(seen) == {torch.float32} and got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.05)


# Sizes, decoding


def test_height_and_width(pipe, calls):
    images = pipe(0, height=12, width=20, num_inference_steps=1).images
    assert images[0].size == (20, 12)
    assert calls[0]["hidden_states"].shape == (1, 3, 12, 20)
    assert latents_of(pipe, latents=torch.zeros(2, 3, 6, 10), num_inference_steps=1).shape == (2, 3, 6, 10)


def test_output_types_agree(pipe):
    as_latents = latents_of(pipe)
    as_tensor = latents_of(pipe, output_type="pt")
    as_array = latents_of(pipe, output_type="np")
    as_pictures = latents_of(pipe, output_type="pil")
    torch.testing.assert_close(as_tensor, (as_latents / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(as_array, as_tensor.permute(0, 2, 3, 1).numpy())
    assert all(isinstance(picture, Image.Image) and picture.mode == "RGB" for picture in as_pictures)
    for picture, array in zip(as_pictures, as_array, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), (array * 255).round().astype("uint8"))


def test_grey_pictures():
    assert make_pipe(in_channels=1)(0, num_inference_steps=1).images[0].mode == "L"


def test_return_dict(pipe):
    (images,) = latents_of_tuple = pipe(0, num_inference_steps=1, return_dict=False)
    assert isinstance(latents_of_tuple, tuple) and len(images) == 1


def test_the_vae_decodes_scaled_and_shifted_latents():
    vae = make_vae()
    pipe = make_pipe(vae=vae, in_channels=4)
    assert pipe.vae_scale_factor == 2
    latents = latents_of(pipe)
    with torch.no_grad():
        expected = (vae.decode(latents / 0.5 + 0.1).sample / 2 + 0.5).clamp(0, 1)
    images = latents_of(pipe, output_type="pt")
    torch.testing.assert_close(images, expected)
    assert images.shape == (2, 3, 16, 16)
    assert latents_of(pipe, output_type="pt", height=24, width=20).shape == (2, 3, 24, 20)
    with pytest.raises(ValueError, match="height must be a positive multiple of 4"):
        pipe(0, height=18)


def test_a_vae_of_other_latents_is_refused():
    with pytest.raises(ValueError, match="the vae has 4 latent channels and the transformer 3"):
        make_pipe(vae=make_vae())(0)


def test_nan_is_no_picture(pipe):
    torch.nn.init.constant_(pipe.transformer.proj_out.bias, math.nan)
    for output_type in ("pil", "latent"):
        with pytest.raises(FloatingPointError, match="not finite.*run the network in float32.*guidance_scale"):
            pipe(0, num_inference_steps=1, output_type=output_type)


def test_nan_from_the_vae_is_no_picture():
    pipe = make_pipe(vae=make_vae(), in_channels=4)
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, math.inf)
    with pytest.raises(FloatingPointError, match="the VAE produced NaN or inf; run it in float32"):
        pipe(0, num_inference_steps=1)


# Callbacks


def test_callback_sees_every_step_and_changes_the_latents(pipe):
    seen = []

    def zero_at_the_end(pipe, index, timestep, kwargs):
        seen.append((index, timestep.item(), sorted(kwargs)))
        if index == pipe.num_timesteps - 1:
            return {"latents": torch.zeros_like(kwargs["latents"])}
        return kwargs

    assert latents_of(pipe, callback_on_step_end=zero_at_the_end, num_inference_steps=4).abs().sum() == 0
    assert seen == [(i, i / 4, ["latents"]) for i in range(4)]
    latents_of(
        pipe, callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(kwargs), callback_on_step_end_tensor_inputs=[]
    )
    assert seen[-1] == {}


def test_callback_changes_the_guidance_scale(pipe, calls):
    def raise_it(pipe, index, timestep, kwargs):
        pipe._guidance_scale += 1.0
        return kwargs

    latents_of(pipe, callback_on_step_end=raise_it, num_inference_steps=3, guidance_scale=0.5)
    assert pipe.guidance_scale == 3.5
    assert [len(call["hidden_states"]) for call in calls] == [2, 4, 4]


def test_callback_interrupts_and_the_next_call_is_whole(pipe, calls):
    expected = latents_of(pipe, num_inference_steps=5)
    calls.clear()

    def stop(pipe, index, timestep, kwargs):
        pipe._interrupt = index == 1
        return kwargs

    latents_of(pipe, callback_on_step_end=stop, num_inference_steps=5)
    assert len(calls) == 2 and pipe.interrupt
    assert torch.equal(latents_of(pipe, num_inference_steps=5), expected)


def test_an_error_in_a_callback_leaves_the_pipeline_usable(pipe):
    pipe.scheduler = InterpolantScheduler(sampler="ode", solver="heun")
    expected = latents_of(pipe)

    def fail(pipe, index, timestep, kwargs):
        if index == 2:
            raise RuntimeError("mine")
        return kwargs

    with pytest.raises(RuntimeError, match="mine"):
        latents_of(pipe, callback_on_step_end=fail)
    assert pipe.current_timestep is None
    assert torch.equal(latents_of(pipe), expected)


def test_current_timestep_is_on_diffusers_clock(pipe):
    seen = []
    latents_of(pipe, callback_on_step_end=lambda p, i, t, k: seen.append(p.current_timestep), num_inference_steps=4)
    assert seen == [1000, 750, 500, 250]


# Schedulers


@pytest.mark.parametrize(
    "options, steps, expected",
    [
        (ODE, 5, 5),
        ({"sampler": "ode", "solver": "heun"}, 5, 10),
        ({}, 5, 5),
        ({"last_step": None}, 5, 5),
        ({"solver": "heun", "diffusion_norm": 0.0}, 5, 9),
        ({"solver": "heun"}, 5, 10),
    ],
)
def test_number_of_network_calls(pipe, calls, options, steps, expected):
    pipe.scheduler = InterpolantScheduler(**options)
    latents_of(pipe, num_inference_steps=steps)
    assert len(calls) == len(pipe.scheduler.timesteps) == pipe.num_timesteps
    assert len(calls) == expected
    times = [call["timestep"][0].item() for call in calls]
    assert times == sorted(times) and times[0] == 0


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_flow_matching_euler_is_the_euler_ode(pipe, guidance_scale):
    expected = latents_of(pipe, num_inference_steps=20, guidance_scale=guidance_scale)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    got = latents_of(pipe, num_inference_steps=20, guidance_scale=guidance_scale)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_other_flow_matching_schedulers_solve_the_same_ode(pipe):
    pipe.scheduler = InterpolantScheduler(sampler="ode", solver="heun")
    expected = latents_of(pipe, num_inference_steps=100)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for scheduler in (
        FlowMatchHeunDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(**flow),
        diffusers.DPMSolverMultistepScheduler(**flow),
    ):
        pipe.scheduler = scheduler
        torch.testing.assert_close(latents_of(pipe, num_inference_steps=50), expected, atol=0.02, rtol=0.02)


def test_noise_of_a_flow_matching_scheduler_comes_from_the_generators(pipe, global_rng_untouched):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    both = latents_of(pipe, (0, 1), (5, 6))
    torch.testing.assert_close(both[1:], latents_of(pipe, [1], [6]), atol=1e-5, rtol=1e-5)


# Mediators


def test_mediators_of_each_call(pipe, calls):
    def counts(num_mediators, **options):
        calls.clear()
        latents_of(pipe, num_mediators=num_mediators, num_inference_steps=5, **options)
        return [call.get("num_mediators") for call in calls]

    assert counts(None) == [None] * 5
    assert counts(9) == [9] * 5
    assert counts((2, 4)) == [(2, 4)] * 5
    assert counts(np.int64(9)) == [9] * 5
    # Noise times are 1, 0.8, 0.6, 0.4, 0.2; a value holds from its start down.
    assert counts(Schedule((1.0, 0.6, 0.2), (1, 4, 16)), guidance_scale=2.0) == [1, 1, 4, 4, 16]
    assert counts(lambda t: 16 if t < 0.5 else None) == [None, None, None, 16, 16]


def test_a_schedule_starts_at_its_time_to_the_digit(pipe, calls):
    latents_of(pipe, num_mediators=Schedule((1.0, 0.3), (1, 4)), num_inference_steps=10)
    assert [call["num_mediators"] for call in calls] == [1] * 7 + [4] * 3


class Recorder:
    """A change-driven schedule whose level is the number of latents it was shown."""

    def __init__(self):
        self.resets, self.shown = 0, []

    def reset(self):
        self.resets += 1
        self.shown = []

    def observe(self, latents):
        self.shown.append(latents.clone())
        return len(self.shown)

    @property
    def value(self):
        return 1 + len(self.shown)


def test_a_change_driven_schedule_sees_the_latents_of_each_step(pipe, calls):
    recorder, states = Recorder(), []

    def remember(pipe, index, timestep, kwargs):
        states.append(kwargs["latents"].clone())

    for _ in range(2):
        calls.clear()
        states.clear()
        final = latents_of(pipe, num_mediators=recorder, num_inference_steps=4, callback_on_step_end=remember)
        assert [call["num_mediators"] for call in calls] == [1, 2, 3, 4]
        assert all(torch.equal(a, b) for a, b in zip(recorder.shown, states, strict=True))
        assert torch.equal(recorder.shown[-1], final)
    assert recorder.resets == 2


@pytest.mark.parametrize(
    "scheduler", [InterpolantScheduler(sampler="ode", solver="heun"), FlowMatchHeunDiscreteScheduler()]
)
def test_a_change_driven_schedule_sees_whole_steps_only(pipe, calls, scheduler):
    pipe.scheduler, recorder = scheduler, Recorder()
    latents_of(pipe, num_mediators=recorder, num_inference_steps=3)
    assert len(recorder.shown) == 3
    assert [call["num_mediators"] for call in calls] == [1, 1, 2, 2, 3, 3][: len(calls)]


def test_the_librarys_change_schedule(pipe, calls):
    schedule = ChangeSchedule(warmup=1, ratios=(1e9, 1e-9), values=(1, 4, 9))
    for _ in range(2):
        calls.clear()
        latents_of(pipe, num_mediators=schedule, num_inference_steps=5)
        assert [call["num_mediators"] for call in calls] == [1, 1, 1, 4, 4]


# Saving, components, caches


def test_save_and_load_are_bit_equal(tmp_path):
    pipe = make_pipe(scheduler=InterpolantScheduler(diffusion_form="sbdm", last_step="tweedie"))
    expected = latents_of(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = SiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.id2label == NAMES and loaded.vae is None
    for name in ("diffusion_form", "last_step", "sampler", "solver"):
        assert loaded.scheduler.config[name] == pipe.scheduler.config[name]
    assert torch.equal(latents_of(loaded), expected)
    assert loaded.get_label_ids("dog") == [1]


def test_the_saved_index_names_the_package(tmp_path):
    make_pipe().save_pretrained(tmp_path)
    config = SiTPipeline.load_config(tmp_path)
    assert tuple(config["transformer"]) == ("attngen", "SiTTransformer2DModel")
    assert tuple(config["scheduler"]) == ("attngen", "InterpolantScheduler")
    assert attngen.SiTTransformer2DModel is SiTTransformer2DModel


def test_save_and_load_with_a_vae_and_a_scheduler_of_diffusers(tmp_path):
    pipe = make_pipe(scheduler=FlowMatchEulerDiscreteScheduler(), vae=make_vae(), in_channels=4, id2label=None)
    expected = latents_of(pipe, output_type="np")
    pipe.save_pretrained(tmp_path)
    loaded = SiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.id2label is None
    np.testing.assert_array_equal(latents_of(loaded, output_type="np"), expected)


def test_the_vae_can_be_taken_away():
    pipe = make_pipe(vae=make_vae(), in_channels=4)
    pipe.vae = None
    assert pipe.vae_scale_factor == 1
    assert latents_of(pipe, output_type="np").shape == (2, 8, 8, 4)
    assert set(pipe.components) == {"transformer", "scheduler", "vae"}


def test_a_call_changes_no_component(pipe):
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    config = copy.deepcopy(dict(pipe.transformer.config)), dict(pipe.scheduler.config)
    latents_of(pipe, guidance_scale=2.0, num_mediators=9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert (dict(pipe.transformer.config), dict(pipe.scheduler.config)) == config
    assert all(parameter.requires_grad for parameter in pipe.transformer.parameters())


def test_progress_bar_counts_network_calls(capfd):
    pipe = make_pipe(scheduler=InterpolantScheduler(sampler="ode", solver="heun"))
    pipe.set_progress_bar_config(disable=False)
    latents_of(pipe, num_inference_steps=3)
    assert "6/6" in capfd.readouterr().err


def test_attention_caches_of_diffusers_work(pipe):
    expected = latents_of(pipe, num_inference_steps=12, guidance_scale=2.0)
    evaluated = []
    pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: evaluated.append(1))
    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 1001),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )
    cached = latents_of(pipe, num_inference_steps=12, guidance_scale=2.0)
    assert 6 <= len(evaluated) <= 9
    torch.testing.assert_close(cached, expected, atol=0.1, rtol=0.1)

    def fail(pipe, index, timestep, kwargs):
        if index == 4:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        latents_of(pipe, labels=(3, 4), num_inference_steps=12, guidance_scale=2.0, callback_on_step_end=fail)
    again = latents_of(pipe, num_inference_steps=12, guidance_scale=2.0)
    assert torch.equal(again, cached), "a failed run leaves nothing in the cache"
    pipe.transformer.disable_cache()
    assert torch.equal(latents_of(pipe, num_inference_steps=12, guidance_scale=2.0), expected)


def test_cache_context_tells_where_the_call_is(pipe, monkeypatch):
    seen = []
    original = type(pipe.transformer).cache_context

    def watch(self, name, **where):
        seen.append((name, where["step_index"], where["num_inference_steps"], round(where["sigma"], 3)))
        return original(self, name, **where)

    monkeypatch.setattr(type(pipe.transformer), "cache_context", watch)
    latents_of(pipe, num_inference_steps=2, guidance_scale=2.0, guidance_interval=(0.0, 0.4))
    assert seen == [("cond_uncond", 0, 2, 1.0), ("cond", 1, 2, 0.5)]
