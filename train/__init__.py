"""Training, drawing sets of images, and measuring them. Files here are programs: `python -m train.sit --help`.

Packages by subject:
    recipe: configuration, presets, objectives, the UNet
    loop: how a run starts, steps, is saved, averaged, sampled and logged
    warm: starting from the weights of another model
    data: images and latents to train on
    emoji: the emoji, and the classifier in whose features they are compared
    autoencoder: what `train.vae` trains
    distillation: what `train.distill` runs
    sampling: what `train.sample` draws, and its files
    metrics: distances between sets of images, and the networks that they need
"""
