"""What a calibration has found so far, kept in a file, so that it can be interrupted, or asked for another bound."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attngen.calibration.sums import Recorded
from attngen.files import write_file
from attngen.learned.file import config_hash
from attngen.plan import Plan
from attngen.version import __version__

FORMAT, VERSION = "attngen-calibration", 1
SAME = 1e-3
"""Two exact results whose lengths or sums differ by a larger share are of other weights or inputs."""


class Notes:
    """Measured layers, errors and times of plans.

    Args:
        path: of the file, read where it exists and written by `keep`; None keeps nothing.
        setting: what the numbers depend on, see `setting_of`.

    Raises:
        ValueError: if the file is none of a calibration, damaged, or of another setting, naming what differs.
    """

    def __init__(self, path: str | os.PathLike[str] | None, setting: Mapping[str, Any]) -> None:
        self.path, self.setting = None if path is None else Path(path), json.loads(json.dumps(setting))
        self.exact: tuple[float, float] | None = None  # length and sum of the exact result
        self.recorded = Recorded()
        self.errors: dict[Plan, float] = {}
        self.rounds: dict[Plan, list[tuple[float, float]]] = {}  # seconds, exact and with the plan
        self.runs = 0
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def check_exact(self, output: Tensor) -> None:
        """Compare the exact result with that of the file; ValueError where it is another one."""
        length, total = float(output.double().norm()), float(output.double().sum())
        if self.exact is None:
            self.exact = length, total
        elif any(abs(a - b) > SAME * length for a, b in zip(self.exact, (length, total), strict=True)):
            raise ValueError(
                f"{self.path} is of another calibration: the exact result differs; delete it to start again"
            )

    def keep(self) -> None:
        """Write the file, if there is one."""
        if self.path is None:
            return
        plans = [
            {"plan": plan.to_dict(), "error": error, "rounds": self.rounds.get(plan, [])}
            for plan, error in self.errors.items()
        ]
        content = {
            **{"format": FORMAT, "version": VERSION, "setting": self.setting, "exact": self.exact, "runs": self.runs},
            **{"layers": self.recorded.to_dict(), "plans": plans},
        }
        write_file(self.path, (json.dumps(content) + "\n").encode())

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read the calibration {path}: {error}") from error
        if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise ValueError(f'{path} is not an unfinished calibration: it has no "format": "{FORMAT}"')
        try:
            other = [name for name, value in self.setting.items() if content["setting"].get(name) != value]
            found = {name: content["setting"].get(name) for name in other}
            self._take(content)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"the calibration {path} is damaged: {error!r}; delete it to start again") from error
        for name, value in found.items():
            raise ValueError(
                f"{path} is of another calibration: its {name} is {_short(value)}, not {_short(self.setting[name])};"
                " delete it to start again"
            )

    def _take(self, content: dict[str, Any]) -> None:
        self.exact = None if content["exact"] is None else (float(content["exact"][0]), float(content["exact"][1]))
        self.recorded, self.runs = Recorded.from_dict(content["layers"]), content["runs"]
        for entry in content["plans"]:
            plan = Plan.from_dict(entry["plan"])
            self.errors[plan] = float(entry["error"])
            self.rounds[plan] = [(float(exact), float(own)) for exact, own in entry["rounds"]]


def setting_of(
    models: Mapping[str, nn.Module], arguments: Mapping[str, Any], cost: str, **options: Any
) -> dict[str, Any]:
    """What the numbers of a calibration depend on, but for the bound: JSON values by name."""
    parameter = next(next(iter(models.values())).parameters())
    found = {name: f"{type(model).__name__} {config_hash(model)}" for name, model in models.items()}
    found |= {name: _described(value) for name, value in arguments.items() if name != "generator"}
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__} if cost == "time" else {}
    return {
        **{"attngen": __version__, "cost": cost, "device": str(parameter.device), "dtype": str(parameter.dtype)},
        **machine,
        **found,
        **options,
    }


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        content = value.detach().cpu().float().numpy().tobytes()
        return f"{tuple(value.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    return repr(value) if isinstance(value, (str, int, float, bool, list, tuple, type(None))) else type(value).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
