"""FLUX.2 [klein] with two reference images: the image's queries go through agents, references are context."""

import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

import attngen

MODEL = "black-forest-labs/FLUX.2-klein-4B"
SIZE, STEPS = 1024, 4
NUM_AGENTS = 1024
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pipe = Flux2KleinPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32)
pipe = pipe.to(DEVICE)
references = [Image.new("RGB", (SIZE, SIZE), color) for color in ("steelblue", "sandybrown")]  # your own images

with attngen.apply(pipe, "agent", num_agents=NUM_AGENTS, min_tokens=0) as handle:
    image = pipe(
        image=references,
        prompt="a lighthouse in the colours of the two images",
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    print(handle.report())
image.save("lighthouse.png")
