"""A SiT with mediator tokens, trained by hand on images of your own; `python -m train.sit` does it at scale."""

import torch

from attngen import InterpolantScheduler, Schedule, SiTPipeline, SiTTransformer2DModel

SIZE, STEPS, BATCH_SIZE = 32, 2000, 32
COUNTS = (4, 16)  # mediators: one count is drawn in every step, so one checkpoint serves them all
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

model = SiTTransformer2DModel(
    sample_size=SIZE,
    patch_size=2,
    in_channels=3,
    num_layers=4,
    num_attention_heads=4,
    attention_head_dim=32,
    num_classes=2,
    attention="mediator",
    num_mediators=max(COUNTS),
    learn_sigma=False,
).to(DEVICE)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
generator = torch.Generator().manual_seed(0)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, H, W) in [-1, 1] and their labels: here a bright half, left or right. Yours go here."""
    labels = torch.randint(2, (BATCH_SIZE,), generator=generator)
    images = torch.full((BATCH_SIZE, 3, SIZE, SIZE), -1.0)
    for image, label in zip(images, labels, strict=True):
        half = slice(0, SIZE // 2) if label == 0 else slice(SIZE // 2, SIZE)
        image[:, :, half] = 1.0
    return images.to(DEVICE), labels.to(DEVICE)


for step in range(STEPS):
    images, labels = batch()
    noise = torch.randn(images.shape, generator=generator).to(DEVICE)
    time = torch.rand(BATCH_SIZE, generator=generator).to(DEVICE)  # 0 is noise, 1 is data
    along = time[:, None, None, None]
    count = COUNTS[int(torch.randint(len(COUNTS), (), generator=generator))]
    velocity = model(along * images + (1 - along) * noise, time, labels, num_mediators=count).sample
    loss = (velocity - (images - noise)).square().mean()  # linear path, arXiv 2401.08740
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

pipe = SiTPipeline(transformer=model.eval(), scheduler=InterpolantScheduler(), id2label={0: "left", 1: "right"})
pipe.save_pretrained("sit")
few_then_many = Schedule(starts=(1.0, 0.5), values=COUNTS)
image = pipe("left", num_inference_steps=25, num_mediators=few_then_many, generator=torch.Generator().manual_seed(0))
image.images[0].save("left.png")
