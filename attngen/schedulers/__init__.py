"""Schedulers, as diffusers classes."""

from attngen.schedulers.interpolant import InterpolantScheduler, InterpolantSchedulerOutput

__all__ = ["InterpolantScheduler", "InterpolantSchedulerOutput"]
