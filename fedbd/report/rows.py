"""Flat rows to a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedbd.records.round_record import plain


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]], empty: Sequence[str] = ()) -> None:
    """Write rows that all have the same names to a ``.csv`` or, for any other name, as JSON.

    Args:
        path: The file; an absent value is empty in CSV and null in JSON.
        rows: Plain values, or what ``round_record.plain`` makes plain: a method's notes may hold numpy's and torch's.
        empty: The header where there is no row.
    """
    text = json.dumps(plain(rows), indent=2, allow_nan=False) + "\n"
    if Path(path).suffix == ".csv":
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]) if rows else list(empty))
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    Path(path).write_text(text, encoding="utf-8", newline="")
