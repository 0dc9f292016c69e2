"""Finding plans by measurement: `calibrate`, its progress, and its measurements."""

from attngen.calibration.candidates import DEFAULT_CANDIDATES
from attngen.calibration.progress import Progress
from attngen.calibration.search import calibrate
from attngen.measurements import Cell, LayerMeasurements, Measurements, Trial

__all__ = ["DEFAULT_CANDIDATES", "Cell", "LayerMeasurements", "Measurements", "Progress", "Trial", "calibrate"]
