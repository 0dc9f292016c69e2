"""attngen beside what else people do to diffusers models: pipelines, LoRA, IP-Adapter, fusing, backends, caches, …"""

import copy
import json
import warnings

import diffusers
import numpy
import pytest
import tomesd
import torch
from PIL import Image

import attngen
from attngen import AgentAttention, AttnGenWarning, ChangeSchedule, DownsampledKV, Plan, Stage, TokenMerging
from tests.builders.hosts import _UNET, HOSTS, TEXT, fresh, normal, randomised, self_attention, snapshot

AGENTS = AgentAttention(num_agents=4)
PLAN = Plan((Stage(1.0, {"*": AGENTS}), Stage(0.5, {"*": DownsampledKV(2)})))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad(), torch.random.fork_rng():
        yield


# Pipelines


def tokenizer(folder):
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Components of a tiny Stable Diffusion: 32 px pictures, latents of 16 x 16."""
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        vocab_size=54,
        hidden_size=TEXT,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=5,
        bos_token_id=52,
        eos_token_id=53,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "text_encoder": CLIPTextModel(text).eval(),
            "vae": randomised(vae),
            "tokenizer": tokenizer(tmp_path_factory.mktemp("tokenizer")),
            "scheduler": diffusers.DDIMScheduler(clip_sample=False),
        }


STABLE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture
def pipe(parts):
    pipe = diffusers.StableDiffusionPipeline(**parts, **STABLE, unet=fresh("sd15"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, height=32, width=32, steps=3, prompt="a cat", **kwargs):
    generator = torch.Generator().manual_seed(0)
    settings = {"output_type": "np", "num_inference_steps": steps, "generator": generator, **kwargs}
    return torch.from_numpy(pipe(prompt, height=height, width=width, **settings).images)


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 16)])
def test_text_to_image_with_guidance(pipe, size):
    exact, clean = draw(pipe, *size), snapshot(pipe.unet)
    with attngen.apply(pipe, "softmax"), warnings.catch_warnings():
        warnings.simplefilter("error", AttnGenWarning)
        assert torch.equal(draw(pipe, *size), exact)
    with attngen.apply(pipe, PLAN) as handle:
        patched = draw(pipe, *size)
        assert torch.equal(draw(pipe, *size), patched)
        assert {layer.model for layer in handle.report().layers} == {"unet"}
    assert patched.shape == exact.shape and torch.isfinite(patched).all()
    assert not torch.equal(patched, exact)
    assert torch.equal(draw(pipe, *size), exact) and snapshot(pipe.unet) == clean


def test_guidance_halves_in_one_call_or_two(pipe):
    """The random draws are the same for both halves, together or apart."""
    attngen.apply(pipe, TokenMerging(0.5, random=True))
    latents, text = normal(1, 4, 16, 16), normal(2, 5, TEXT)
    both = pipe.unet(latents.expand(2, -1, -1, -1), 500, text).sample
    for half in (0, 1):
        alone = pipe.unet(latents, 500, text[half : half + 1]).sample
        assert (both[half] - alone[0]).abs().max() < 1e-4


def test_same_seed_same_picture_whatever_ran_before(pipe):
    attngen.apply(pipe, Plan((Stage(1.0, {"*": TokenMerging(0.5, random=True)}), Stage(0.5, {"*": AGENTS}))))
    first = draw(pipe)
    draw(pipe, 16, 48, prompt="a dog", steps=2)
    torch.manual_seed(5)
    assert torch.equal(draw(pipe), first)


def test_stopped_in_the_middle(pipe):
    exact, clean = draw(pipe), snapshot(pipe.unet)

    class Stop(Exception):
        pass

    def stop(pipe, step, timestep, kwargs):
        if step == 1:
            raise Stop
        return kwargs

    with pytest.raises(Stop), attngen.apply(pipe, PLAN):
        draw(pipe, callback_on_step_end=stop)
    assert snapshot(pipe.unet) == clean and torch.equal(draw(pipe), exact)


def test_a_change_schedule_as_callback(pipe):
    """Every run starts on the first level, also after one that ended on the last."""
    levels = []

    class Noted(ChangeSchedule):
        def __call__(self, *args):
            levels.append(self.level)
            return super().__call__(*args)

    switch = Noted(warmup=1, ratios=(100.0, 99.0))  # as early as possible
    attngen.apply(pipe, PLAN, switch=switch)
    settings = {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": ["latents"], "steps": 6}
    first = draw(pipe, **settings)
    assert switch.level == 2 and levels[0] == 0 and levels[-1] == 2
    assert torch.equal(draw(pipe, **settings), first)
    assert levels[:6] == levels[6:]


def test_image_to_image_and_inpainting_share_the_patch(pipe):
    picture = Image.fromarray((normal(32, 32, 3).sigmoid().numpy() * 255).astype("uint8"))
    mask = Image.fromarray(numpy.eye(32, dtype="uint8") * 255)
    img2img = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    inpaint = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    for other in (img2img, inpaint):
        other.set_progress_bar_config(disable=True)

    def run(other):
        extra = {"mask_image": mask, "height": 32, "width": 32} if other is inpaint else {}
        generator = torch.Generator().manual_seed(0)
        out = other(
            "a cat", image=picture, strength=0.7, num_inference_steps=4, generator=generator, output_type="np", **extra
        )
        return torch.from_numpy(out.images)

    exact = [run(img2img), run(inpaint)]
    handle = attngen.apply(pipe, PLAN)
    patched = [run(img2img), run(inpaint)]
    assert all(torch.isfinite(x).all() and not torch.equal(x, y) for x, y in zip(patched, exact, strict=True))
    attngen.remove(inpaint)
    assert not handle.is_applied
    assert all(torch.equal(x, y) for x, y in zip([run(img2img), run(inpaint)], exact, strict=True))


def test_dit_pipeline(parts):
    pipe = diffusers.DiTPipeline(fresh("dit"), parts["vae"], diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def run():
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe([1, 2], generator=generator, num_inference_steps=3, output_type="np").images)

    exact = run()
    with attngen.apply(pipe, PLAN):
        patched = run()
        assert torch.isfinite(patched).all() and not torch.equal(patched, exact)
    assert torch.equal(run(), exact)


def test_stages_of_a_sampler_follow_its_noise(parts):
    """In SD3's and FLUX's pipelines time falls from 1 as in Stable Diffusion's."""
    seen = []
    vae = randomised(diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=1))
    flux = randomised(
        diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=0,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 6, 6),
        )
    )
    empty = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler=scheduler, vae=vae, transformer=flux, **empty)
    pipe.set_progress_bar_config(disable=True)
    attngen.apply(pipe, PLAN)
    processor = flux.transformer_blocks[0].attn

    def note(module, args, kwargs):
        seen.append(kwargs["attngen"].stage)

    hook = processor.register_forward_pre_hook(note, with_kwargs=True)
    pipe(
        prompt_embeds=normal(1, 5, TEXT),
        pooled_prompt_embeds=normal(1, 8),
        height=32,
        width=64,
        num_inference_steps=6,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    hook.remove()
    assert seen == ["0"] * seen.count("0") + ["1"] * seen.count("1") and set(seen) == {"0", "1"}


# ControlNet


def test_controlnet_beside_the_unet(parts):
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, **STABLE, unet=fresh("sd15"), controlnet=fresh("controlnet")
    )
    pipe.set_progress_bar_config(disable=True)
    latents, text = normal(2, 4, 16, 16), normal(2, 5, TEXT)
    picture = normal(2, 3, 128, 128)

    def run():
        down, middle = pipe.controlnet(latents, 400, text, picture, return_dict=False)
        out = pipe.unet(latents, 400, text, down_block_additional_residuals=down, mid_block_additional_residual=middle)
        return out.sample

    exact, clean = run(), (snapshot(pipe.unet), snapshot(pipe.controlnet))
    handle = attngen.apply(pipe, PLAN)
    assert {layer.model for layer in handle.report().layers} == {"unet", "controlnet"}
    patched = run()
    attngen.remove(pipe.unet)
    assert handle.is_applied and not torch.equal(run(), patched)
    handle.remove()
    assert torch.equal(run(), exact) and (snapshot(pipe.unet), snapshot(pipe.controlnet)) == clean


# LoRA


def add_lora(model, name="lora"):
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        model.add_adapter(config, adapter_name=name)
    return model


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "sit"])
def test_lora_before_and_after(name):
    host = HOSTS[name]
    before, after, stock = add_lora(fresh(name)), fresh(name), add_lora(fresh(name))
    plain = fresh(name)
    attngen.apply(plain, AGENTS)
    attngen.apply(before, AGENTS)
    handle = attngen.apply(after, AGENTS)
    add_lora(after)
    want = host(before)
    assert torch.equal(host(after), want)
    assert not torch.equal(want, host(plain))
    for scale in (0.25, 0.0):
        scaled = [host(m, **{host.channel: {"scale": scale}}) for m in (before, after)]
        assert torch.equal(*scaled) and not torch.equal(scaled[0], want)
    assert (scaled[0] - host(plain)).abs().max() < 1e-5
    handle.remove()
    assert torch.equal(host(after), host(stock))


# IP-Adapter


def ip_adapter(model):
    """A random IP-Adapter with one picture token a layer, as its checkpoints are laid out."""
    state = {}
    layers = [n for n in model.attn_processors if n.endswith("attn2.processor")]
    for i, name in enumerate(layers):
        width = model.get_submodule(name.removesuffix(".processor")).to_k.out_features
        state[f"{2 * i + 1}.to_k_ip.weight"] = normal(width, TEXT, seed=2 * i)
        state[f"{2 * i + 1}.to_v_ip.weight"] = normal(width, TEXT, seed=2 * i + 1)
    projection = {
        "proj.weight": normal(4 * TEXT, 8),
        "proj.bias": normal(4 * TEXT),
        "norm.weight": torch.ones(TEXT),
        "norm.bias": torch.zeros(TEXT),
    }
    return {"ip_adapter": state, "image_proj": projection}


def call_with_picture(model):
    added = {"image_embeds": [normal(2, 1, 8)]}
    return model(normal(2, 4, 16, 16), 400, normal(2, 5, TEXT), added_cond_kwargs=added).sample


def test_ip_adapter_before_and_after():
    stock, before, after = fresh("sd15"), fresh("sd15"), fresh("sd15")
    for model in (stock, before):
        model._load_ip_adapter_weights([ip_adapter(model)])
    clean = snapshot(before)
    exact = call_with_picture(stock)
    first = attngen.apply(before, AGENTS)
    want = call_with_picture(before)
    assert not torch.equal(want, exact)
    second = attngen.apply(after, AGENTS)
    after._load_ip_adapter_weights([ip_adapter(after)])
    assert torch.equal(call_with_picture(after), want)
    assert sum(layer.is_active for layer in second.report().layers) == 7
    first.remove()
    assert torch.equal(call_with_picture(before), exact) and snapshot(before) == clean
    second.remove()
    assert torch.equal(call_with_picture(after), exact)


# Fusing, slicing, other processors


@pytest.mark.parametrize("name", ["sd15", "pixart", "sd3", "flux", "sit"])
def test_fused_before(name):
    host, model, plain = HOSTS[name], fresh(name), fresh(name)
    model.fuse_qkv_projections()
    exact, clean = host(model), snapshot(model)
    attngen.apply(plain, AGENTS)
    handle = attngen.apply(model, AGENTS)
    fused = host(model)
    assert (fused - host(plain)).abs().max() < 1e-4
    assert {layer.name for layer in handle.report().layers if layer.is_active}
    handle.remove()
    assert torch.equal(host(model), exact) and snapshot(model) == clean


@pytest.mark.parametrize("name", ["sd15", "pixart", "sd3", "sit"])
def test_fused_after_is_noticed_and_mended(name, unmeasured):
    host, model, exact = HOSTS[name], fresh(name), fresh(name)
    handle = attngen.apply(model, AGENTS)
    patched = host(model)
    model.fuse_qkv_projections()
    if all(isinstance(a.processor, attngen.hosts.hooks.PROCESSORS) for a in self_attention(model).values()):
        assert (host(model) - patched).abs().max() < 1e-4  # fused in place: still ours
        return
    with pytest.warns(AttnGenWarning, match="Fused.*reapply") as record:
        for _ in range(3):
            assert (host(model) - host(exact)).abs().max() < 1e-4
    assert len(record) == 1
    handle.reapply()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (host(model) - patched).abs().max() < 1e-4
    handle.remove()
    model.unfuse_qkv_projections()
    assert (host(model) - host(exact)).abs().max() < 1e-4
    handle = attngen.apply(model, AGENTS)  # whatever processors are there now
    assert (host(model) - patched).abs().max() < 1e-4
    handle.remove()
    assert (host(model) - host(exact)).abs().max() < 1e-4


def test_unfusing_brings_the_patch_back():
    host, model = HOSTS["sd15"], fresh("sd15")
    clean = snapshot(model)
    handle = attngen.apply(model, AGENTS)
    patched = host(model)
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(host(model), patched)
    handle.remove()
    assert snapshot(model)["processors"] == clean["processors"]


def test_slicing_is_noticed_and_mended():
    host, model = HOSTS["sd15"], fresh("sd15")
    exact = host(model)
    handle = attngen.apply(model, AGENTS)
    patched = host(model)
    model.set_attention_slice(1)
    with pytest.warns(AttnGenWarning, match="SlicedAttnProcessor.*reapply") as record:
        for _ in range(3):
            assert (host(model) - exact).abs().max() < 1e-4
    assert len(record) == 1
    handle.reapply()
    assert (host(model) - patched).abs().max() < 1e-4  # cross-attention is still sliced
    assert not (host(model) - exact).abs().max() < 1e-2
    handle.remove()
    assert (
        type(model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor).__name__ == "SlicedAttnProcessor"
    )


class Custom:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return 2 * hidden_states


def test_a_custom_processor_is_left_alone(caplog):
    host, model, name = HOSTS["sd15"], fresh("sd15"), "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    model.get_submodule(name).set_processor(Custom())
    processor = model.get_submodule(name).processor
    exact = host(model)
    with attngen.apply(model, AGENTS) as handle:
        assert model.get_submodule(name).processor is processor
        assert not torch.equal(host(model), exact)
        row = next(layer for layer in handle.report().layers if layer.name == name)
        assert "Custom" in row.left_alone
    assert torch.equal(host(model), exact)
    assert not caplog.records


def test_pag_is_left_alone_and_ours_comes_back(parts):
    pipe = diffusers.StableDiffusionPAGPipeline(**parts, **STABLE, unet=fresh("sd15"), pag_applied_layers="mid")
    pipe.set_progress_bar_config(disable=True)
    exact = draw(pipe, pag_scale=2.0)
    handle = attngen.apply(pipe, AGENTS)
    patched = draw(pipe, pag_scale=2.0)
    assert torch.isfinite(patched).all() and not torch.equal(patched, exact)
    assert torch.equal(draw(pipe, pag_scale=2.0), patched)
    assert all(isinstance(a.processor, attngen.hosts.hooks.PROCESSORS) for a in self_attention(pipe.unet).values())
    middle = "mid_block.attentions.0.transformer_blocks.0.attn1"
    pipe._set_pag_attn_processor(["mid"], do_classifier_free_guidance=True)
    second = attngen.apply(pipe, AGENTS)
    row = next(layer for layer in second.report().layers if layer.name == middle)
    assert "PAG" in row.left_alone
    second.remove()
    handle.remove()


# diffusers' hooks


@pytest.mark.parametrize("name", ["pixart", "sit"])
def test_guiders_that_skip_attention_scores_keep_working(name):
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip
    from diffusers.hooks.layer_skip import _LAYER_SKIP_HOOK

    host = HOSTS[name]
    settings = {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True}
    outputs = []
    for patched in (False, True):
        model = fresh(name)
        if patched:
            attngen.apply(model, Plan((Stage(1.0, {"transformer_blocks.0.*": AGENTS}),)))
        apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn="transformer_blocks", **settings))
        outputs.append(host(model))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], host(fresh(name)))
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)
    registry.remove_hook(_LAYER_SKIP_HOOK, recurse=True)
    plain = fresh(name)
    attngen.apply(plain, Plan((Stage(1.0, {"transformer_blocks.0.*": AGENTS}),)))
    assert torch.equal(host(model), host(plain))


@pytest.mark.parametrize("name", ["pixart", "sit"])
def test_guiders_that_skip_attention(name):
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    outputs = []
    for method in (attngen.SoftmaxAttention(), AGENTS):
        model = fresh(name)
        attngen.apply(model, Plan((Stage(1.0, {"transformer_blocks.0.*": method}),)))
        apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn="transformer_blocks", skip_ff=False))
        outputs.append(HOSTS[name](model))
    assert torch.equal(*outputs)  # the only layer with a method is skipped


@pytest.mark.parametrize("name", ["sd3", "sd35"])
@pytest.mark.parametrize("skipped", ["skip_attention", "skip_attention_scores"])
def test_guiders_on_sd3_work_or_say_that_they_do_not(name, skipped):
    """diffusers itself knows no such layers and says so."""
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    off = {"skip_attention": False, "skip_attention_scores": False, "skip_ff": False}
    model = fresh(name)
    attngen.apply(model, AGENTS)
    try:
        apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn="transformer_blocks", **{**off, skipped: True}))
    except ValueError as error:
        assert "not registered" in str(error)
        return
    out = HOSTS[name](model)
    assert torch.isfinite(out).all() and out.shape == HOSTS[name](fresh(name)).shape


@pytest.mark.parametrize("name", ["dit", "pixart", "sit", "flux"])
def test_pyramid_attention_broadcast(name):
    """Every second call takes the attention of the one before."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    host, outputs = HOSTS[name], []
    for method in ("softmax", AGENTS):
        model = fresh(name)
        attngen.apply(model, method)
        first, second = host(model, time=0.5), host(model, time=0.4)
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 900),
            spatial_attention_block_identifiers=["transformer_blocks", "single_transformer_blocks"],
            current_timestep_callback=lambda: 500,
        )
        apply_pyramid_attention_broadcast(model, config)
        a, b = host(model, time=0.5), host(model, time=0.4)
        assert torch.equal(a, first) and not torch.equal(b, second)
        outputs.append(b)
    assert not torch.equal(*outputs)


def test_tomesd_on_top():
    host, model = HOSTS["sd15"], fresh("sd15")
    exact = host(model)
    handle = attngen.apply(model, AGENTS)
    patched = host(model)
    tomesd.apply_patch(model, ratio=0.5, use_rand=False)
    assert torch.isfinite(host(model)).all()
    tomesd.remove_patch(model)
    assert torch.equal(host(model), patched)
    handle.remove()
    assert torch.equal(host(model), exact)


# Attention backends


@pytest.fixture
def dispatched(monkeypatch):
    """Backends that diffusers' dispatcher ran, in order; the process-wide choice is put back."""
    from diffusers.models import attention_dispatch as dispatch

    registry, calls = dispatch._AttentionBackendRegistry, []
    active = registry._active_backend
    for backend in (dispatch.AttentionBackendName._NATIVE_MATH, dispatch.AttentionBackendName.NATIVE):
        function = registry._backends[backend]

        def spied(*args, _function=function, _backend=backend, **kwargs):
            calls.append(_backend.value)
            return _function(*args, **kwargs)

        monkeypatch.setitem(registry._backends, backend, spied)
    yield calls
    registry._active_backend = active


def close(got, want, tolerance=1e-4):
    assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max())


@pytest.mark.parametrize("name", ["sd15", "dit", "pixart", "sd3", "sd35", "flux", "sit"])
@pytest.mark.parametrize("method", ["softmax", AGENTS], ids=str)
def test_attention_backends_take_effect(name, method, dispatched):
    host, model, count = HOSTS[name], fresh(name), len(self_attention(fresh(name)))
    attngen.apply(model, method)
    want = host(model)
    dispatched.clear()
    with diffusers.attention_backend("_native_math"):
        close(host(model), want)
    assert dispatched.count("_native_math") >= count
    dispatched.clear()
    close(host(model), want, 1e-6)
    assert "_native_math" not in dispatched
    model.set_attention_backend("_native_math")
    close(host(model), want)
    assert dispatched.count("_native_math") >= count
    attngen.remove(model)


def test_a_backend_chosen_before_the_patch_stays(dispatched):
    """FLUX's own processors carry the choice."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    host, model = HOSTS["flux"], fresh("flux")
    model.set_attention_backend("_native_math")
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)  # another model chose otherwise since
    attngen.apply(model, AGENTS)
    host(model)
    assert set(dispatched) == {"_native_math"}


def test_a_backend_chosen_while_patched_outlives_a_change_of_method(dispatched):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    for name in ("sd15", "flux"):
        host, model = HOSTS[name], fresh(name)
        attngen.apply(model, "softmax")
        model.set_attention_backend("_native_math")
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
        attngen.apply(model, AGENTS)
        dispatched.clear()
        host(model)
        assert dispatched.count("_native_math") >= len(self_attention(model)), name


# Memory and precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize(
    "method", [AGENTS, DownsampledKV(2), TokenMerging(0.25, 4, 0.9), attngen.LinearAttention("elu")]
)
@pytest.mark.parametrize("name", ["sd15", "dit", "pixart", "sd3", "sd3-norm", "sd35", "flux", "sit"])
def test_autocast(name, method, dtype):
    """No dtype clashes, and where no tokens are chosen an error like the stock model's."""
    host, model = HOSTS[name], fresh(name)

    def error():
        wide = host(model, batch=1)
        with torch.autocast("cpu", dtype):
            narrow = host(model, batch=1)
        assert torch.isfinite(narrow).all()
        return (narrow.float() - wide).abs().mean() / wide.abs().mean()

    stock = error()
    with warnings.catch_warnings(action="ignore", category=AttnGenWarning), attngen.apply(model, method):
        patched = error()
    if not isinstance(method, TokenMerging):
        assert patched < 4 * stock


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd15", "sit"])
def test_half_precision_weights(name, dtype):
    model = fresh(name).to(dtype)
    for method in (AGENTS, TokenMerging(0.25, 4, 0.9), DownsampledKV(2), attngen.LinearAttention("elu"), "softmax"):
        with warnings.catch_warnings(action="ignore", category=AttnGenWarning), attngen.apply(model, method):
            latents = normal(1, 4, 16, 16, seed=4).to(dtype)
            args = (normal(1, 5, TEXT).to(dtype),) if name == "sd15" else (torch.tensor([1]),)
            out = model(latents, torch.tensor([0.4], dtype=dtype), *args).sample
            assert out.dtype == dtype and torch.isfinite(out).all()


@pytest.mark.parametrize("sequential", [False, True])
def test_offloading_by_accelerate(sequential):
    import accelerate

    for name in ("sd15", "sd3", "sit"):
        host, model, plain = HOSTS[name], fresh(name), fresh(name)
        attngen.apply(plain, PLAN)
        want = [host(plain, time=time) for time in (0.9, 0.1)]
        attngen.apply(model, PLAN)
        if sequential:
            accelerate.cpu_offload(model, torch.device("cpu"))
        else:
            model, _ = accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
        for time, value in zip((0.9, 0.1), want, strict=True):
            # Projections that are brought from elsewhere when called cannot be absorbed.
            assert (host(model, time=time) - value).norm() <= 1e-5 * value.norm()
        attngen.remove(model)
        assert torch.equal(host(model), host(fresh(name)))


def test_group_offloading():
    host, model, plain = HOSTS["pixart"], fresh("pixart"), fresh("pixart")
    attngen.apply(plain, PLAN)
    attngen.apply(model, PLAN)
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    assert torch.equal(host(model), host(plain))


def test_patched_in_the_constructor_on_the_meta_device(tmp_path, monkeypatch):
    """As when a checkpoint is loaded: the model is built without memory, then filled."""
    import functools

    host, source = HOSTS["sd15"], fresh("sd15")
    stock = host(source)
    source.save_pretrained(tmp_path)
    constructor = diffusers.UNet2DConditionModel.__init__

    @functools.wraps(constructor)
    def patched(self, *args, **kwargs):
        constructor(self, *args, **kwargs)
        attngen.apply(self, AGENTS)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "__init__", patched)
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**_UNET)
    assert model.device.type == "meta"
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(source.state_dict())
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    attngen.apply(source, AGENTS)
    want = host(source)
    assert not torch.equal(want, stock)
    for other in (model, loaded):
        assert torch.equal(host(other), want)
        attngen.remove(other)
        assert torch.equal(host(other), stock)


def test_saving_a_patched_pipeline(pipe, tmp_path):
    exact = draw(pipe)
    attngen.apply(pipe, PLAN)
    pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), exact)


def test_a_copied_pipeline_is_independent(pipe):
    exact = draw(pipe)
    handle = attngen.apply(pipe, AGENTS)
    other = copy.deepcopy(pipe.unet)
    handle.remove()
    pipe.unet = other
    assert not torch.equal(draw(pipe), exact)
    attngen.remove(pipe)
    assert torch.equal(draw(pipe), exact)


def test_quantised_or_wrapped_projections_are_called_as_modules():
    """Never by their weights: LoRA, quantisation and offloading sit in the module's call."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    for name in ("pixart", "sd3", "flux", "sit"):
        host, wrapped, scaled = HOSTS[name], fresh(name), fresh(name)
        for layer, attn in self_attention(wrapped).items():
            attn.to_v = Doubled(attn.to_v)
            for parameter in scaled.get_submodule(layer).to_v.parameters():
                parameter.mul_(2)
        for method in (AGENTS, TokenMerging(0.25, 4, 0.9), DownsampledKV(2)):
            attngen.apply(wrapped, method)
            attngen.apply(scaled, method)
            close(host(wrapped), host(scaled), 1e-5)
