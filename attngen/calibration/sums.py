"""The numbers that a calibration keeps of its layers, as data: JSON values and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from attngen.calibration.fit import Gains, Products


@dataclass
class Sums:
    """Sums over the measured calls of one layer in one stage.

    Attributes:
        exact: sum of the squares of its exact output.
        squares: sum of squared errors, by probe.
        products: for the probes that are fitted.
        gains: of heads, for the probes that have them.
        influence: relative error of the model's prediction by relative error of this layer; NaN until measured.
    """

    exact: float = 0.0
    squares: dict[int, float] = field(default_factory=dict[int, float])
    products: dict[int, Products] = field(default_factory=dict[int, Products])
    gains: dict[int, Gains] = field(default_factory=dict[int, Gains])
    influence: float = float("nan")


@dataclass
class Recorded:
    """All that was measured of layers.

    Attributes:
        sums: by layer and stage.
        active: probes that are not exact in a layer.
        tokens: of each layer, in the order of the model.
        operations: of each layer by probe, -1 is exact; of one sample and call.
        times: seconds of one call of each layer by probe, -1 is exact; empty where times are no cost.
        done: numbers of the calls that were measured, by model.
        influence_calls: calls of a network with layers replaced.
    """

    sums: dict[tuple[str, int], Sums] = field(default_factory=dict[tuple[str, int], Sums])
    active: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    tokens: dict[str, int] = field(default_factory=dict[str, int])
    operations: dict[str, dict[int, float]] = field(default_factory=dict[str, dict[int, float]])
    times: dict[str, dict[int, float]] = field(default_factory=dict[str, dict[int, float]])
    done: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    influence_calls: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, but for an influence that is NaN."""
        return {
            **asdict(self),
            "active": {layer: sorted(probes) for layer, probes in self.active.items()},
            "sums": [[layer, stage, asdict(sums)] for (layer, stage), sums in self.sums.items()],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recorded:
        """What `to_dict` made; raises KeyError, TypeError, ValueError or AttributeError for anything else."""
        found = cls(**{**data, "sums": {}})
        found.active = {layer: set(probes) for layer, probes in data["active"].items()}
        found.operations = {layer: _by_probe(numbers) for layer, numbers in data["operations"].items()}
        found.times = {layer: _by_probe(numbers) for layer, numbers in data["times"].items()}
        for layer, stage, sums in data["sums"]:
            products = {int(i): Products(**numbers) for i, numbers in sums["products"].items()}
            gains = {int(i): Gains(**numbers) for i, numbers in sums["gains"].items()}
            squares = _by_probe(sums["squares"])
            found.sums[layer, stage] = Sums(sums["exact"], squares, products, gains, sums["influence"])
        return found


def _by_probe(numbers: dict[str, float]) -> dict[int, float]:
    return {int(probe): float(number) for probe, number in numbers.items()}
