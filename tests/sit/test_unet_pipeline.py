"""UNetClassPipeline: conditions, clock, guidance, sizes, files, and patches on a UNet of classes."""

import dataclasses

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DConditionModel,
)
from torch.nn import functional as F

import attngen
from attngen.sit.unet_pipeline import UNetClassPipeline, class_condition

NAMES = {0: "cat", 1: "golden retriever, dog", 2: "crane", 3: "Red Fox"}
NULL = 4


def make_unet(seed=0, **config):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            **{
                "sample_size": 8,
                "in_channels": 3,
                "out_channels": 3,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "block_out_channels": (16, 16),
                "layers_per_block": 1,
                "cross_attention_dim": 5,
                "num_class_embeds": 5,
                "attention_head_dim": 2,
                "norm_num_groups": 4,
                **config,
            }
        )
        for parameter in unet.parameters():  # attention starts as the identity, which would test nothing
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return unet.eval()


def make_pipe(unet=None, scheduler=None, id2label=NAMES):
    pipe = UNetClassPipeline(unet or make_unet(), scheduler or FlowMatchEulerDiscreteScheduler(), id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, labels, seeds=None, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in (seeds or range(len(labels)))]
    options = {"num_inference_steps": 3, "output_type": "latent", **options}
    return pipe(labels, generator=generators, **options).images


def by_hand(unet, labels, seeds, steps, scale):
    """Euler steps from noise to data, the network called on one picture at a time."""
    pictures = []
    for label, seed in zip(labels, seeds, strict=True):
        sample = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            level = 1 - step / steps
            outputs = []
            for number in (NULL, label):
                token = torch.zeros(1, 1, 5)
                token[0, 0, number] = 1
                with torch.no_grad():
                    call = unet(sample, 1000 * level, token, class_labels=torch.tensor([number]))
                outputs.append(call.sample)
            velocity = outputs[0] + scale * (outputs[1] - outputs[0])
            sample = sample - velocity / steps  # the network predicts noise - data
        pictures.append(sample)
    return torch.cat(pictures)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_pictures_are_those_of_euler_steps_by_hand(scale, global_rng_untouched):
    unet = make_unet()
    got = draw(make_pipe(unet), [2, "dog"], [5, 6], num_inference_steps=4, guidance_scale=scale)
    torch.testing.assert_close(got, by_hand(unet, [2, 1], [5, 6], 4, scale), atol=2e-5, rtol=1e-4)


def test_the_class_enters_by_token_and_by_embedding():
    condition = class_condition(torch.tensor([1, 4]), 5, torch.float32)
    assert condition["encoder_hidden_states"].tolist() == [[[0, 1, 0, 0, 0]], [[0, 0, 0, 0, 1]]]
    unet = make_unet()
    sample = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def call(token, label):
        tokens = F.one_hot(torch.tensor([[token]]), 5).float()
        with torch.no_grad():
            return unet(sample, 500, tokens, class_labels=torch.tensor([label])).sample

    assert not torch.allclose(call(0, 0), call(1, 0)) and not torch.allclose(call(0, 0), call(0, 1))


def test_a_picture_does_not_depend_on_the_others():
    pipe = make_pipe()
    together = draw(pipe, [0, 1, 2], [7, 8, 9], guidance_scale=2.0)
    for place, (label, seed) in enumerate(((0, 7), (1, 8), (2, 9))):
        alone = draw(pipe, [label], [seed], guidance_scale=2.0)
        torch.testing.assert_close(alone[0], together[place], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [FlowMatchHeunDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
def test_the_network_is_shown_1000_times_the_noise_level(scheduler):
    pipe = make_pipe(scheduler=scheduler(num_train_timesteps=500))
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[1].flatten().tolist()))
    draw(pipe, [0, 1])
    hook.remove()
    sigmas = pipe.scheduler.timesteps / 500
    assert len(seen) == len(sigmas) and all(a == b for a, b in seen)
    assert [pair[0] for pair in seen] == pytest.approx((1000 * sigmas).tolist())
    assert seen[0][0] == 1000


def test_half_precision_and_other_sizes():
    pipe = make_pipe()
    assert draw(pipe, [0], height=12, width=20).shape == (1, 3, 12, 20)
    half = make_pipe(make_unet().to(torch.bfloat16))
    latents = torch.randn(1, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    a = half([0], latents=latents, num_inference_steps=2, output_type="pt").images
    b = pipe([0], latents=latents, num_inference_steps=2, output_type="pt").images
    assert a.shape == (1, 3, 6, 10) and 0 < (a.float() - b).abs().max() < 0.1


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(output_type):
    images = draw(make_pipe(), [0, 1], output_type=output_type)
    if output_type == "pil":
        assert [image.size for image in images] == [(8, 8), (8, 8)]
    else:
        assert tuple(images.shape) == ((2, 8, 8, 3) if output_type == "np" else (2, 3, 8, 8))


def test_a_callback_sees_sets_and_interrupts():
    seen = []

    def callback(pipe, index, timestep, kwargs):
        seen.append((index, float(timestep), pipe.guidance_scale, pipe.num_timesteps))
        pipe._guidance_scale = 1.0
        pipe._interrupt = index == 1
        return {"latents": torch.zeros_like(kwargs["latents"])} if index == 1 else {}

    pipe = make_pipe()
    images = draw(pipe, [0], num_inference_steps=4, guidance_scale=2.0, callback_on_step_end=callback)
    assert [entry[0] for entry in seen] == [0, 1] and [entry[2] for entry in seen] == [2.0, 1.0]
    assert seen[0][1] == 1000 and seen[0][3] == 4 and not images.any()


def test_a_folder_gives_the_same_pictures(tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    loaded = attngen.UNetClassPipeline.from_pretrained(tmp_path)
    assert loaded.id2label == NAMES and loaded.num_classes == 4
    loaded.set_progress_bar_config(disable=True)
    # Weights are equal; where they lie in memory changes the last bit.
    torch.testing.assert_close(draw(pipe, ["red fox"]), draw(loaded, ["red fox"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["agent", "agentsd", "tome", "todo", "focal", "linear", "softmax"])
def test_patches_and_back(method):
    pipe = make_pipe()
    before = draw(pipe, [0, 1])
    # The presets' 256 agents, and regions of 16 x 16, are more than the tokens here.
    small = {"agent": attngen.AgentAttention(num_agents=4), "focal": attngen.FocalAttention(2, 1, 4)}
    if method in small:
        plan = attngen.Plan.of(small[method])
    else:
        plan = method if method == "softmax" else dataclasses.replace(attngen.PRESETS[method], min_tokens=16)
    handle = attngen.apply(pipe, plan)
    names = {layer.name for layer in handle.report().layers}
    patched = draw(pipe, [0, 1])
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1" in names
    assert patched.isfinite().all() and torch.equal(patched, before) == (method == "softmax")
    handle.remove()
    assert torch.equal(draw(pipe, [0, 1]), before)


def test_a_plan_by_time_follows_the_noise_level():
    """Agents in the noisier half alone: steps 0 and 1 of 4 start at levels 1 and 0.75, 2 and 3 at 0.5 and 0.25."""
    pipe = make_pipe()
    plain = draw(pipe, [0], num_inference_steps=4)
    plan = attngen.Plan(
        stages=(
            attngen.Stage(start=1.0, layers={"*": attngen.AgentAttention(num_agents=4)}),
            attngen.Stage(start=0.5, layers={"*": attngen.SoftmaxAttention()}),
        ),
        min_tokens=16,
    )
    states = []
    options = {"num_inference_steps": 4, "callback_on_step_end": lambda p, i, t, k: states.append(k["latents"]) or {}}
    draw(pipe, [0], **options)
    with attngen.apply(pipe, plan):
        first_half = draw(pipe, [0], **options)
    assert not torch.equal(first_half, plain) and not torch.equal(states[5], states[1])
    for step in (2, 3):  # from the same latents on, exact steps
        level = 1 - step / 4
        with torch.no_grad():
            output = pipe.unet(
                states[4 + step - 1], 1000 * level, **class_condition(torch.tensor([0]), 5, torch.float32)
            ).sample
        torch.testing.assert_close(states[4 + step], states[4 + step - 1] - output / 4, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": "cta"}, "nearest: cat"),
        ({"class_labels": 4}, "the model's 4 classes are 0 to 3"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number >= 1, got 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"height": 7}, "height must be a positive multiple of 2 for this model, got 7; try 6 or 8"),
        ({"width": 0}, "try 2"),
        ({"output_type": "jpg"}, "known: pil, np, pt, latent"),
        ({"generator": [torch.Generator()] * 2}, "1 images need 1 generators, got a list of 2"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"\(1, 3, 8, 8\), got \(1, 4, 8, 8\)"),
        ({"latents": torch.zeros(1, 3, 8, 7)}, "must be a positive multiple of 2 for this model, got 7; try 6 or 8"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "may name"),
    ],
)
def test_wrong_arguments_end_before_work(options, message, monkeypatch):
    pipe = make_pipe()
    monkeypatch.setattr(UNet2DConditionModel, "forward", lambda *a, **k: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [0], "num_inference_steps": 2, **options})


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="DDIMScheduler does not fit"):
        make_pipe(scheduler=DDIMScheduler())("cat")
    with pytest.raises(ValueError, match="use_dynamic_shifting=False"):
        make_pipe(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))("cat")
    with pytest.raises(ValueError, match="got 5 and 7"):
        make_pipe(make_unet(cross_attention_dim=7))("cat")
    unet = make_unet()
    unet.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="not finite"):
        make_pipe(unet)("cat", num_inference_steps=1)
