"""Image sets in the Hugging Face hub's parquet form: a column of encoded pictures and one of class numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import MinLen
from numpy.typing import NDArray

from fedbd.data.cache import cached
from fedbd.data.checks import Arrays, check_values, describe, shorten, to_dataset
from fedbd.data.files import locate
from fedbd.data.groups import group_numbers, per_class_problems
from fedbd.data.pictures import Picture, decode_all, place, shape_of
from fedbd.errors import DataError, Problem
from fedbd.method_fields import checks_fields
from fedbd.types import Dataset

Batch = tuple[int, list[Picture | str], NDArray[np.int64], NDArray[np.bool_]]
"""Number of the first row, pictures or what stands in their place, labels, which labels are null."""
ROWS = 4096
CHUNK = 128
MOST_THREADS = 8


@dataclass(frozen=True, kw_only=True)
@checks_fields
class ImageParquet:
    """Parquet files whose picture column is a struct {bytes, path}, the bytes a JPEG, PNG or the like.

    The first picture of a part decides: grayscale gives one channel, anything else three. A grayscale picture in a part
    of color pictures is repeated over the channels. Transparency and 16 bits are refused. All pictures have one size.

    Attributes:
        train: The training part: a file or glob, relative to the data folder, or absolute.
        test: The test part, likewise.
        image: Name of the column of pictures.
        label: Name of the column of class numbers.
        groups: Name of the training part's column that says whose each picture is, integers or text: client ids, tracks
            of near copies. Partition ``natural`` splits by it.
        groups_per_class: The ids are counted anew in each class.
    """

    train: str
    test: str
    image: str = "img"
    label: str = "label"
    groups: Annotated[str, MinLen(1)] | None = None
    groups_per_class: bool = False

    @property
    def has_groups(self) -> bool:
        """Whether the data set gets a column of groups."""
        return self.groups is not None

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong between the fields."""
        return per_class_problems(self.groups, self.groups_per_class)

    def load(self, root: Path | None) -> Dataset:
        """Return the decoded data set (see ``types.DataSource``).

        Raises:
            DataError: With every problem of the files.
        """
        train, problems = locate(self.train, root)
        test, others = locate(self.test, root)
        if problems or others:
            raise DataError(problems + others)
        # Pillow's version counts: what a JPEG decodes to is up to the library that it brings.
        fields: dict[str, Any] = {"image": self.image, "label": self.label}
        fields |= {"train_files": len(train), "pillow": version("pillow")}
        if self.groups is not None:
            fields |= {"groups": self.groups, "groups_per_class": self.groups_per_class}
        return to_dataset(cached("image_parquet", fields, train + test, lambda: self._decode(train, test)))

    def _decode(self, train: list[Path], test: list[Path]) -> Arrays:
        """Read and check both parts: first all schemas, then the rows."""
        parts = {"train": [(_name(self.train, p), p) for p in train], "test": [(_name(self.test, p), p) for p in test]}
        problems = [
            x for part, files in parts.items() for name, path in files for x in self._schema_problems(name, path, part)
        ]
        if problems:
            raise DataError(problems)
        arrays: Arrays = {}
        for part, files in parts.items():
            images, labels, bad = self._read(files)
            problems += bad
            arrays |= {f"{part}_images": images, f"{part}_labels": labels}
        if self.groups is not None:
            column, bad = _column(parts["train"], self.groups)
            problems += bad
            if not problems:
                arrays["train_groups"] = group_numbers(column, arrays["train_labels"], self.groups_per_class)
        if problems:
            raise DataError(problems)
        paths = {"train_labels": f"{self.train}:{self.label}", "test_labels": f"{self.test}:{self.label}"}
        check_values(arrays, paths | {"test_images": f"{self.test}:{self.image}"})
        return arrays

    def _schema_problems(self, name: str, path: Path, part: str) -> list[Problem]:
        """Return what is wrong with a file before its rows are read."""
        import pyarrow as pa  # noqa: PLC0415 - a cache hit needs neither pyarrow nor Pillow
        import pyarrow.parquet as pq  # noqa: PLC0415

        try:
            meta = pq.ParquetFile(path)
        except (pa.ArrowException, OSError, ValueError):
            remedy = "copy the file again"
            return [Problem(path=name, expected="must be a parquet file", got="a damaged or other file", remedy=remedy)]
        schema, problems = meta.schema_arrow, []
        wanted = {
            "image": (self.image, "must be a struct with encoded pictures in a field named bytes", _is_picture),
            "label": (self.label, "must be integers", pa.types.is_integer),
        }
        if part == "train" and self.groups is not None:
            wanted["groups"] = (self.groups, "must be integers or text", _is_id)
        for field, (column, expected, fits) in wanted.items():
            where = f"{name}:{column}"
            if column not in schema.names:
                remedy = f"the file has {', '.join(schema.names)}; name the right one in data.{field}"
                problems.append(Problem(path=where, expected="must be there", got="no such column", remedy=remedy))
            elif not fits(schema.field(column).type):
                problems.append(Problem(path=where, expected=expected, got=str(schema.field(column).type)))
        if meta.metadata.num_rows == 0:
            problems.append(Problem(path=name, expected="must not be empty", got="0 rows"))
        return problems

    def _read(self, files: list[tuple[str, Path]]) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[Problem]]:
        """Decode the rows of a part; beside problems, the arrays are empty."""
        images, labels, problems = [], [], []
        shape: tuple[int, int, int] | None = None
        for name, path in files:
            bad: list[Problem] = []
            for start, pictures, classes, missing in self._batches(name, path):
                shape = shape or next((shape_of(p) for p in pictures if not isinstance(p, str)), None)
                expected = f"must be a picture{f' of {describe(shape)}' if shape else ''}"
                batch = np.zeros((len(pictures), *(shape or (1, 1, 1))), dtype=np.uint8)
                for row, picture in enumerate(pictures):
                    reason = picture if isinstance(picture, str) else place(picture, batch[row])
                    if reason:
                        where = f"{name}:{self.image}, row {start + row}"
                        bad.append(Problem(path=where, expected=expected, got=reason))
                for at in np.flatnonzero(missing):
                    where = f"{name}:{self.label}, row {start + at}"
                    bad.append(Problem(path=where, expected="must be a class number", got="null"))
                images.append(batch)
                labels.append(classes)
            problems += shorten(name, bad)
        if not labels:
            problems.append(
                Problem(path=files[0][0], expected="must hold rows", got="none", remedy="copy the file again")
            )
        if problems:
            return np.empty(0, np.uint8), np.empty(0, np.int64), problems
        return np.concatenate(images), np.concatenate(labels), []

    def _batches(self, name: str, path: Path) -> Iterator[Batch]:
        """Yield the rows of a file, decoded."""
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415

        start = 0
        # Pillow lets go of the interpreter while it decodes, which pays for larger pictures.
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
            try:
                for rows in pq.ParquetFile(path).iter_batches(ROWS, columns=[self.image, self.label]):
                    encoded = [cell and cell["bytes"] for cell in rows.column(self.image).to_pylist()]
                    chunks = [encoded[at : at + CHUNK] for at in range(0, len(encoded), CHUNK)]
                    pictures = [picture for chunk in pool.map(decode_all, chunks) for picture in chunk]
                    column = rows.column(self.label)
                    classes = column.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
                    yield start, pictures, classes, column.is_null().to_numpy(zero_copy_only=False)
                    start += len(encoded)
            except (pa.ArrowException, OSError, ValueError) as error:
                got = (str(error) or type(error).__name__).splitlines()[0]
                problem = Problem(path=name, expected="must be readable", got=got, remedy="copy the file again")
                raise DataError([problem]) from None


def _name(pattern: str, path: Path) -> str:
    """Return a found file as the user wrote it; of a glob, its own name."""
    return pattern if Path(pattern).name == path.name else path.name


def _is_picture(kind: Any) -> bool:
    """Return whether an Arrow type is a struct with binary ``bytes``."""
    import pyarrow as pa  # noqa: PLC0415

    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    held = kind.field("bytes").type
    return bool(pa.types.is_binary(held) or pa.types.is_large_binary(held))


def _is_id(kind: Any) -> bool:
    """Return whether an Arrow type is one of integers or text."""
    import pyarrow as pa  # noqa: PLC0415

    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _column(files: list[tuple[str, Path]], name: str) -> tuple[NDArray[np.generic], list[Problem]]:
    """Read a column of ids; where it has nulls, return the problems instead."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    parts, problems = [], []
    for file, path in files:
        try:
            values = pq.read_table(path, columns=[name]).column(name).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            got = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(
                [Problem(path=file, expected="must be readable", got=got, remedy="copy the file again")]
            ) from None
        rows = [row for row, value in enumerate(values) if value is None]
        expected = "must be an id of a group"
        bad = [Problem(path=f"{file}:{name}, row {row}", expected=expected, got="null") for row in rows]
        problems += shorten(file, bad)
        parts.append(np.asarray([value for value in values if value is not None]))
    if len({part.dtype.kind in "iu" for part in parts}) > 1:
        expected = "must be integers in all files, or text in all"
        problems.append(Problem(path=f"{files[0][0]}:{name}", expected=expected))
    return np.concatenate(parts) if not problems else np.empty(0, np.int64), problems
