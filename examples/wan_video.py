"""Wan 2.2, text to video: both transformers with agents in frames, rows and columns, written as an mp4 file."""

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import attngen

MODEL = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
HEIGHT, WIDTH, FRAMES, STEPS = 720, 1280, 81, 40
NUM_AGENTS = 1024
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pipe = WanPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32).to(DEVICE)
handle = attngen.apply(pipe, "agent", num_agents=NUM_AGENTS, min_tokens=0)
frames = pipe(
    prompt="a lighthouse in a storm, waves",
    height=HEIGHT,
    width=WIDTH,
    num_frames=FRAMES,
    num_inference_steps=STEPS,
    generator=torch.Generator().manual_seed(0),
).frames[0]
print(handle.report())
handle.remove()
export_to_video(frames, "lighthouse.mp4", fps=16)
