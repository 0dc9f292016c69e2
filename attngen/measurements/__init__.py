"""What a calibration measured, as data: a part of the plan that it found."""

from attngen.measurements.data import Cell, LayerMeasurements, Measurements, Trial

__all__ = ["Cell", "LayerMeasurements", "Measurements", "Trial"]
