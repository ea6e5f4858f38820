"""Measure what the dependencies cost: import time and size on disk. Prints the table of docs/dependencies.md."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

MODULES = {
    "flwr": "flwr.app, flwr.clientapp, flwr.serverapp.strategy",
    "ray": "ray",
    "torch": "torch",
    "torchvision": "torchvision",
    "tenseal": "tenseal",
    "numpy": "numpy",
    "pyyaml": "yaml",
    "annotated-types": "annotated_types",
    "pydantic": "pydantic",
    "typer": "typer",
    "rich": "rich.console, rich.live, rich.table",
    "scikit-learn": "sklearn.metrics",
    "scipy": "scipy.stats",
    "safetensors": "safetensors",
    "pyarrow": "pyarrow.parquet",
    "pillow": "PIL.Image",
    "matplotlib": "matplotlib.figure, matplotlib.backends.backend_agg",
}
"""Distribution -> what fedbd imports of it."""

REPEATS = 5
TIMED = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"


def seconds(modules: str) -> float:
    """Return the least CPU time of several imports, each in a fresh interpreter, with everything that they pull in."""
    command = [sys.executable, "-c", TIMED.format(modules)]
    return min(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        for _ in range(REPEATS)
    )


def megabytes(name: str) -> float:
    """Return the size of a distribution's own files, without what it depends on."""
    files = importlib.metadata.files(name) or []
    sizes = (Path(str(file.locate())) for file in files)
    return sum(path.stat().st_size for path in sizes if path.is_file()) / 1e6


def main() -> None:
    """Print the table."""
    print("| package | version | on disk, MB | import, CPU s |\n| --- | --- | --- | --- |")
    for name, modules in MODULES.items():
        version = importlib.metadata.version(name)
        print(f"| {name} | {version} | {megabytes(name):.1f} | {seconds(modules):.2f} |")


if __name__ == "__main__":
    main()
