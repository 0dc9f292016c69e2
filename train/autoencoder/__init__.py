"""The autoencoder that `train.vae` trains."""
