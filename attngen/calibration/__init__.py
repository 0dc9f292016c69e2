"""Finding plans by measurement: `calibrate`, and its measurements."""

from attngen.calibration.candidates import DEFAULT_CANDIDATES
from attngen.calibration.measurements import Cell, LayerMeasurements, Measurements, Trial
from attngen.calibration.search import calibrate

__all__ = ["DEFAULT_CANDIDATES", "Cell", "LayerMeasurements", "Measurements", "Trial", "calibrate"]
