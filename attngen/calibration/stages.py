"""Where the stages of a calibrated plan start, and at which calls of the network layers are measured."""

from __future__ import annotations

from collections.abc import Sequence

from attngen.schedule import stage_at

MAX_STAGES = 8
FEW_STEPS = 8
"""A run with at most so many steps has a stage for each."""
USUAL_STAGES = 3
SAMPLES = 2
"""Network calls of a stage at which layers are measured."""


def stage_starts(times: Sequence[float], num_stages: int | None) -> tuple[float, ...]:
    """Times at which stages start so that each has as many of the pipeline's own steps, as near as can be.

    A start is between two steps, so it has the same effect with somewhat more or fewer steps.

    Args:
        times: of the network's calls, 1 is noise.
        num_stages: number of stages; None has one a step where there are few, since none of them resembles another.

    Raises:
        ValueError: if there are fewer steps than stages.
    """
    steps = sorted(set(times), reverse=True)
    if num_stages is None:
        num_stages = len(steps) if len(steps) <= FEW_STEPS else USUAL_STAGES
    if len(steps) < num_stages:
        raise ValueError(
            f"{num_stages} stages need as many steps, but this call of the pipeline takes {len(steps)}; lower"
            f" num_stages or raise num_inference_steps"
        )
    firsts = [round(i * len(steps) / num_stages) for i in range(1, num_stages)]
    return (1.0, *((steps[first - 1] + steps[first]) / 2 for first in firsts))


def choose_calls(times: Sequence[float], starts: Sequence[float]) -> dict[int, bool]:
    """Numbers of the calls to measure at, spread over each stage; True once a stage, where influence is measured."""
    chosen: dict[int, bool] = {}
    for stage in range(len(starts)):
        numbers = [i for i, moment in enumerate(times) if stage_at(starts, moment) == stage]
        count = min(SAMPLES, len(numbers))
        picked = [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]
        chosen.update({number: number == picked[len(picked) // 2] for number in picked})
    return chosen
