"""Stable Diffusion 1.5 at 1,024 pixels with agents in the layers of many tokens, and without, from the same noise."""

import time

import torch
from diffusers import StableDiffusionPipeline

import attngen

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SIZE, STEPS = 1024, 25
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float16 if DEVICE == "cuda" else torch.float32)
pipe = pipe.to(DEVICE)


def draw(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    image = pipe(
        "a lighthouse in a storm", height=SIZE, width=SIZE, num_inference_steps=STEPS, generator=generator
    ).images[0]
    print(f"{name}: {time.perf_counter() - start:.1f} s")
    image.save(f"{name}.png")


draw("exact")
handle = attngen.apply(pipe, "agent", num_agents=256)
print(handle.report())
draw("agent")
handle.remove()
