"""Tiny text-to-image pipelines with random weights: Stable Diffusion and SDXL, 64 px, one token for each letter."""

import diffusers
import torch
import transformers

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
    return transformers.CLIPTokenizer(vocab=VOCABULARY, merges=[], model_max_length=77)


def _scheduler():
    return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def build_sd(**vae):
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
