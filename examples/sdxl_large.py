"""SDXL at 2,048 pixels: a plan with exact attention in the last steps, saved to a file and applied from it."""

import torch
from diffusers import StableDiffusionXLPipeline

import attngen
from attngen import AgentAttention, Plan, SoftmaxAttention, Stage

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
SIZE, STEPS = 2048, 30
MIN_TOKENS = 1024
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

plan = Plan(
    stages=(
        Stage(start=1.0, layers={"*": AgentAttention(num_agents=256)}),
        Stage(start=0.3, layers={"*": SoftmaxAttention()}),  # details are made at the end
    ),
    min_tokens=MIN_TOKENS,  # layers of fewer tokens stay exact
)
plan.save("plan.json")

pipe = StableDiffusionXLPipeline.from_pretrained(
    MODEL, torch_dtype=torch.float16 if DEVICE == "cuda" else torch.float32
)
pipe = pipe.to(DEVICE)
with attngen.apply(pipe, "plan.json") as handle:
    with handle.trace() as trace:
        image = pipe(
            "a lighthouse in a storm",
            height=SIZE,
            width=SIZE,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    print(trace)  # what ran in each layer and stage
image.save("lighthouse.png")
