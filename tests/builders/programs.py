"""Tiny pipelines that the programs and the page load from folders.

Text-to-image pipelines (Stable Diffusion, SDXL) of 64 px with one token for each letter; a SiT of 16 px with four
classes. The weights are random, the same in every call.
"""

import diffusers
import torch

from attngen import InterpolantScheduler, SiTPipeline, SiTTransformer2DModel

NAMES = {0: "face", 1: "heart", 2: "crane, bird", 3: "crane, machine"}
"""Labels of the SiT's classes."""

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
VOCABULARY = {token: number for number, token in enumerate(TOKENS)}
WIDTH = 16
# 32 x 32 latents, so that the outer level has 1024 tokens.
UNET = {
    "sample_size": 32,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
}
TEXT = {
    "vocab_size": len(TOKENS),
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": VOCABULARY["<|startoftext|>"],
    "eos_token_id": VOCABULARY["<|endoftext|>"],
    "pad_token_id": VOCABULARY["<|endoftext|>"],
}


def _tokenizer():
    import transformers  # an optional dependency, which most tests of these pipelines do not need

    return transformers.CLIPTokenizer(vocab=VOCABULARY, merges=[], model_max_length=77)


def _scheduler():
    return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def build_sd(**vae):
    """A StableDiffusionPipeline; keyword arguments replace values of the VAE's configuration."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "vae": diffusers.AutoencoderKL(**{**VAE, **vae}),
            "unet": diffusers.UNet2DConditionModel(**UNET),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
        }
    return diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=_tokenizer(),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sdxl():
    """A StableDiffusionXLPipeline."""
    import transformers

    config = transformers.CLIPTextConfig(**TEXT, projection_dim=WIDTH)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
        "cross_attention_dim": 2 * WIDTH,
        "transformer_layers_per_block": (1, 1),
        "use_linear_projection": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "vae": diffusers.AutoencoderKL(**VAE),
            "unet": diffusers.UNet2DConditionModel(**{**UNET, **added}),
            "text_encoder": transformers.CLIPTextModel(config),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(config),
        }
    return diffusers.StableDiffusionXLPipeline(
        **parts, tokenizer=_tokenizer(), tokenizer_2=_tokenizer(), scheduler=_scheduler(), add_watermarker=False
    )


def build_sit(attention="mediator"):
    """A SiTPipeline of pixels, with 4 mediators or `attention="softmax"`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiTTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=3,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            num_classes=len(NAMES),
            learn_sigma=False,
            attention=attention,
            num_mediators=4,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    scheduler = InterpolantScheduler(sampler="ode", solver="euler", prediction_type="velocity")
    return SiTPipeline(model.eval(), scheduler, id2label=NAMES)


def save_sit(folder, attention="mediator"):
    """Writes the SiT's pipeline into a folder and returns the folder's name."""
    build_sit(attention).save_pretrained(folder)
    return str(folder)
