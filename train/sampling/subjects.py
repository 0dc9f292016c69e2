"""What each picture of a set shows: its label or prompt, and its seed. A function of the options and of its number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.cli import UserError

BALANCED, DATA, RANDOM = "balanced", "data", "random"
PLACE = "{}"


@dataclass(frozen=True)
class Subject:
    """What one picture shows.

    Attributes:
        label: number of the class, or None.
        prompt: the text, or None.
        negative_prompt: what not to draw, or None.
    """

    label: int | None = None
    prompt: str | None = None
    negative_prompt: str | None = None


def subjects_hash(subjects: Sequence[Subject]) -> str:
    """Hexadecimal digits that tell lists of subjects apart."""
    return hashlib.sha256(json.dumps([asdict(subject) for subject in subjects]).encode()).hexdigest()[:16]


def picture_seed(seed: int, index: int) -> int:
    """Seed of picture `index`; a hash, so that sets of neighbouring seeds share no noise."""
    from pipelines.cli.seeds import generator_for

    return generator_for(seed, "picture", index).initial_seed()


def choose_labels(
    wanted: str, count: int, seed: int, id2label: Mapping[int, str], num_classes: int, find: Callable[[str], int]
) -> list[int]:
    """The label of every picture.

    Args:
        wanted: "balanced", each class in turn; "data", in the frequencies of the emoji; "random", uniform, as SiT's
            reference code has it; a file with a name or number a line; or one name or number.
        count: number of pictures.
        seed: of "random".
        id2label: names of the classes, perhaps none.
        num_classes: number of classes.
        find: number of a class from its name or number.

    Raises:
        UserError: if there is no such class or file, or the file has another number of lines.
    """
    if wanted == BALANCED:
        return [index % num_classes for index in range(count)]
    if wanted == DATA:
        return _emoji_labels(count, id2label)
    if wanted == RANDOM:
        return [_random_label(seed, index, num_classes) for index in range(count)]
    if Path(wanted).is_file():
        lines = read_lines(Path(wanted))
        if len(lines) != count:
            raise UserError(f"{wanted} has {len(lines)} labels for {count} images; expected one per image")
        return [find(line) for line in lines]
    return [find(wanted)] * count


def _random_label(seed: int, index: int, num_classes: int) -> int:
    import torch

    from pipelines.cli.seeds import generator_for

    return int(torch.randint(num_classes, (), generator=generator_for(seed, "label", index)))


def _emoji_labels(count: int, id2label: Mapping[int, str]) -> list[int]:
    from train.metrics.frechet import reference_labels

    names = [id2label[number] for number in sorted(id2label)]
    try:
        return reference_labels(count, names).tolist()
    except ValueError as error:
        raise UserError(f"--labels data is for models of the emoji: {error}; give a file of labels") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        UserError: if it cannot be read, or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not any(lines):
        raise UserError(f"{path} has no lines")
    return [line for line in lines if line]


def read_prompts(path: Path) -> list[Subject]:
    """Prompts of a text file, one a line, or of JSON lines with "prompt" and perhaps "negative_prompt" and "label".

    Raises:
        UserError: if the file cannot be read, naming the line.
    """
    lines = read_lines(path)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [Subject(prompt=line) for line in lines]
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1)]


def _parsed(path: Path, number: int, line: str) -> Subject:
    try:
        found: Any = json.loads(line)
        subject = Subject(found.get("label"), found["prompt"], found.get("negative_prompt"))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f'line {number} of {path} is not a JSON object with a "prompt"') from None
    texts = [subject.prompt, subject.negative_prompt or ""]
    is_number = subject.label is None or (isinstance(subject.label, int) and not isinstance(subject.label, bool))
    if not all(isinstance(text, str) for text in texts) or not is_number:
        raise UserError(f"line {number} of {path}: prompts must be texts and a label a whole number")
    return subject


def class_prompts(names: Sequence[str], template: str) -> list[Subject]:
    """A prompt for each class, with its line as label.

    Of several names separated by commas, as ImageNet has them, the first is used.

    Args:
        names: of the classes.
        template: a text with {} for the name.

    Raises:
        UserError: if the template has not exactly one {}.
    """
    if template.count(PLACE) != 1:
        raise UserError(f"--prompt-template is {template!r}; expected one {PLACE} for the name of the class")
    return [Subject(label, template.replace(PLACE, name.split(",")[0].strip())) for label, name in enumerate(names)]


def repeat(subjects: Sequence[Subject], count: int, negative_prompt: str | None = None) -> list[Subject]:
    """`count` subjects, in turn; `negative_prompt` for those without their own."""
    chosen = [subjects[index % len(subjects)] for index in range(count)]
    return [Subject(s.label, s.prompt, s.negative_prompt or negative_prompt) for s in chosen]
