"""The training loop: how a run starts, steps, is saved, sampled and measured."""
