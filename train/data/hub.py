"""Data sets of Hugging Face's `datasets` as a source of pictures."""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from train.data.sources import Source, fingerprint_of


class HubSource(Source):
    """A data set by its name on the Hub, or in a folder of files or of `save_to_disk`.

    The picture column is the one of type `Image` and the label column the one of type `ClassLabel`, or of integers or
    strings where there is no such type; of several, the one called "image" or "label".

    Args:
        spec: "NAME_OR_FOLDER" or "NAME_OR_FOLDER:SPLIT"; the split is "train" by default.

    Raises:
        ValueError: if `datasets` is missing, or the data set, split, columns or labels are.
    """

    def __init__(self, spec: str) -> None:
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(f"hf:{spec} needs the package datasets; pip install 'attngen[data]' installs it")
        import datasets

        self.spec = spec
        table = _load(spec)
        if not len(table):
            raise ValueError(f"hf:{spec} is empty; choose another split, as in hf:NAME:train")
        features = table.features
        self.column = self._choose("image", [k for k, v in features.items() if isinstance(v, datasets.Image)])
        named = [k for k, v in features.items() if isinstance(v, datasets.ClassLabel)]
        label = self._choose("label", named or [k for k, v in features.items() if _may_be_label(v)])
        self.class_names, self.labels = self._read_labels(table.select_columns([label]), label)
        # Undecoded: this package decodes all sources alike, with a bound on the size of a picture.
        self.rows: Any = table.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        self.fingerprint = fingerprint_of("hf", self.class_names, self.labels, (self.column, label))

    def _choose(self, what: str, found: list[str]) -> str:
        if len(found) == 1:
            return found[0]
        if what in found:
            return what
        have = f"several {what} columns ({', '.join(found)})" if found else f"no {what} column"
        raise ValueError(f"hf:{self.spec} has {have}; expected one called {what!r}")

    def _read_labels(self, table: Any, column: str) -> tuple[list[str], Tensor]:
        """Class names, and (N,) labels: those of a `ClassLabel`, else the sorted values that occur."""
        values = table.with_format("arrow")[:][column]
        if values.null_count:
            raise ValueError(f"hf:{self.spec} has {values.null_count} rows without a label; filter them out")
        array = values.to_numpy()
        names = getattr(table.features[column], "names", None)
        if names is None:
            distinct, array = np.unique(array, return_inverse=True)
            names = [str(value) for value in distinct]
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= len(names):
            raise ValueError(
                f"hf:{self.spec} has labels from {low} to {high} for {len(names)} classes; choose a labelled split"
            )
        return list(names), torch.from_numpy(array.astype(np.int64))

    def name(self, index: int) -> str:
        return f"hf:{self.spec}[{index}]"

    def open(self, index: int) -> BinaryIO:
        cell = self.rows[index][self.column]
        if cell is None:
            raise ValueError("the row has no image")
        if cell["bytes"] is not None:
            return io.BytesIO(cell["bytes"])
        return open(cell["path"], "rb")


def _may_be_label(feature: Any) -> bool:
    dtype = getattr(feature, "dtype", None)
    return isinstance(dtype, str) and (dtype.startswith(("int", "uint")) or dtype in ("string", "large_string"))


def _load(spec: str) -> Any:
    import datasets

    match = re.fullmatch(r"(.+?):([^/\\]+)", spec)  # the colon of a drive has slashes after it
    name, split = match.groups() if match else (spec, "train")
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            tables: Any = datasets.load_from_disk(name)
            if split not in tables:
                raise ValueError(f"it has the splits {', '.join(tables)}, not {split!r}")
            return tables[split]
        if (Path(name) / "state.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises classes of its own and of half a dozen others
        reason = " ".join(str(error).split())
        raise ValueError(
            f"hf:{spec} cannot be loaded ({type(error).__name__}: {reason}); "
            "expected hf:NAME_OR_FOLDER or hf:NAME_OR_FOLDER:SPLIT"
        ) from error
