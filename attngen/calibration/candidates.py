"""The methods that are tried: agent methods at several sharpnesses, to be fitted; all others as given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attngen.learned.methods import LearnedMethod
from attngen.methods import METHOD_CLASSES, AgentAttention, AttentionMethod, SoftmaxAttention, TileAttention

DEFAULT_CANDIDATES: tuple[AttentionMethod, ...] = tuple(
    cls(**options) for cls in METHOD_CLASSES.values() for options in cls.candidates
)
"""Those that were best in some layer of a trained UNet or SiT, and the same with more agents; docs/calibration.md."""

EXPONENTS = (0.0, 0.3, 0.5, 0.75, 1.0, 1.3)
"""Sharpnesses of the broadcast that are tried; 1 is the usual scale, and was the best most often."""


@dataclass(frozen=True)
class Probe:
    """One computation of a layer to compare with the exact one.

    Attributes:
        method: that is run.
        candidate: index of the candidate it belongs to, or -1.
        fitted: whether it has gain 1 and no shortcut; the output for any other values follows from its output.
        only_timed: whether its output is not needed: an option that is fitted to other probes has a cost.
    """

    method: AttentionMethod
    candidate: int
    fitted: bool = False
    only_timed: bool = False


WITHOUT = AgentAttention(num_agents=1, gain=0.0, shortcut=0.0)
"""A layer without the output of its agents: bias and residual."""

VALUES = replace(WITHOUT, shortcut=1.0)
"""The same plus the projected values."""


def probes_of(candidates: Sequence[AttentionMethod]) -> list[Probe]:
    """The computations that the candidates need; the first two are `WITHOUT` and `VALUES`."""
    probes = [Probe(WITHOUT, -1), Probe(VALUES, -1)]
    for i, candidate in enumerate(candidates):
        if not isinstance(candidate, AgentAttention):
            probes.append(Probe(candidate, i))
            if isinstance(candidate, TileAttention):
                probes.append(Probe(replace(candidate, gain=1.0, head_gains=()), i, only_timed=True))
            continue
        plain = replace(candidate, gain=1.0, shortcut=0.0)
        exponents = dict.fromkeys((*EXPONENTS, candidate.broadcast_exponent))
        probes += [Probe(replace(plain, broadcast_exponent=exponent), i, fitted=True) for exponent in exponents]
        # A shortcut can need one more projection.
        probes.append(Probe(replace(candidate, shortcut=candidate.shortcut or 0.075), i, only_timed=True))
    return probes


def check_candidates(candidates: Any) -> tuple[AttentionMethod, ...]:
    """The candidates as a tuple without repeats; None gives the default ones.

    Raises:
        ValueError: for no candidate, or one that is not a method, is exact, needs weights, or is random.
    """
    if candidates is None:
        return DEFAULT_CANDIDATES
    if isinstance(candidates, (str, AttentionMethod)) or not isinstance(candidates, Iterable):
        raise ValueError(f"candidates must be a sequence of attention methods, got {candidates!r}")
    found = tuple(dict.fromkeys(_check_candidate(candidate) for candidate in candidates))
    wanted = tuple(candidate for candidate in found if not isinstance(candidate, SoftmaxAttention))
    if not wanted:
        raise ValueError("candidates has no method besides exact attention; omit it to use the defaults")
    return wanted


def _check_candidate(candidate: Any) -> AttentionMethod:
    if not isinstance(candidate, AttentionMethod):
        raise ValueError(f"a candidate is an attention method such as AgentAttention(num_agents=64), got {candidate!r}")
    if isinstance(candidate, LearnedMethod):
        raise ValueError(f"{candidate.kind} needs weights and cannot be a candidate")
    if candidate.needs_draws:
        raise ValueError(f"{candidate!r} is random; set random=False")
    return candidate


MAX_HEADS = 8
"""Most heads that have gains of their own; layers of more have one gain, since each gain is an output to compute."""


def with_gains(method: TileAttention, heads: int) -> list[TileAttention]:
    """The method without a gain, then with a gain of 1 in each head alone, or in all of more than `MAX_HEADS`."""
    plain = replace(method, gain=0.0, head_gains=())
    if heads > MAX_HEADS:
        return [plain, replace(plain, gain=1.0)]
    return [plain, *(replace(plain, head_gains=tuple(float(h == one) for h in range(heads))) for one in range(heads))]


def gained(method: TileAttention, gains: Sequence[float]) -> TileAttention:
    """The method with the gains that were fitted to outputs of `with_gains`, one of them for all heads."""
    if len(gains) == 1:
        return replace(method, gain=gains[0], head_gains=())
    return replace(method, gain=0.0, head_gains=tuple(gains))
