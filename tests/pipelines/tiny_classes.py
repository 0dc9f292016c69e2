"""A tiny SiT with random weights, 16 px, saved as a pipeline folder, for tests of the engine and the page."""

import torch

from attngen import InterpolantScheduler, SiTPipeline, SiTTransformer2DModel

NAMES = {0: "face", 1: "heart", 2: "crane, bird", 3: "crane, machine"}


def build_sit(attention="mediator"):
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
    build_sit(attention).save_pretrained(folder)
    return str(folder)
