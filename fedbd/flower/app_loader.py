"""Loads a Flower component from its folder, under a module name of its own.

``clients`` and ``server`` are the commonest names there are: imported by name, a user's own ``clients.py`` in the
current folder, or another wheel's, would run in place of the app. Loaded by path, only the named folder can.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pickle
import re
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from fedbd.errors import Problem, UserError

AppFactory = Callable[[], Any] | tuple[Path, str]
"""What gives a ClientApp: a callable without arguments, or (path, attribute).

The path is a module's file, or a package's folder, whose ``app.py`` is then meant; ``load_component`` loads it. For
worker processes a callable must be one they can import: a function of a module, or a ``functools.partial`` of one.
"""

_PREFIX = "_fedbd_app_"
_lock = threading.Lock()


def load_component(app_dir: Path, package: str, module: str = "app", attribute: str = "app") -> object:
    """Return an attribute of a module in an app's folder, for example its ClientApp.

    The package becomes ``_fedbd_app_<package>`` in ``sys.modules``, so relative imports inside it work and absolute
    imports of its bare name do not find it. A second call in the same process returns the same object. Should two
    folders hold a package of the same name, the second gets a digest of its path behind its name.

    Args:
        app_dir: The folder that holds the package.
        package: The package's folder in it; an ``__init__.py`` is optional.
        module: The module in the package.
        attribute: The name in the module.

    Raises:
        UserError: If the file, or the attribute in it, is missing.
        Exception: Whatever the app's own code raises when it is imported.
    """
    folder = Path(app_dir).resolve() / package
    file = folder / f"{module}.py"
    if not file.is_file():
        raise UserError(
            [Problem(path=str(file), expected="must be the Python file of a Flower component; it is missing")]
        )
    importlib.invalidate_caches()
    loaded = importlib.import_module(f"{_package(folder)}.{module}")
    if not hasattr(loaded, attribute):
        raise UserError([Problem(path=str(file), expected=f"must define `{attribute}`; it does not")])
    return getattr(loaded, attribute)


def _package(folder: Path) -> str:
    """Return the private name of the package in a folder, loading it first where that is still to be done."""
    with _lock:
        name = _PREFIX + re.sub(r"\W", "_", folder.name)
        if name in sys.modules and list(sys.modules[name].__path__) != [str(folder)]:
            name += "_" + hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        if name not in sys.modules:
            _load_package(name, folder)
        return name


def _load_package(name: str, folder: Path) -> None:
    """Put a folder into ``sys.modules`` as a package and run its ``__init__.py``, if it has one."""
    init = folder / "__init__.py"
    if not init.is_file():
        bare = ModuleType(name)
        bare.__path__ = [str(folder)]
        sys.modules[name] = bare
        return
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        raise UserError([Problem(path=str(init), expected="must be a Python file that can be imported")])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        # A half-run package must not pass for a loaded one at the next try.
        del sys.modules[name]
        raise


def as_callable(factory: AppFactory) -> Callable[[], Any]:
    """Return an app factory in its form without arguments."""
    if not isinstance(factory, tuple):
        return factory
    path, attribute = Path(factory[0]).resolve(), factory[1]
    folder, module = (path, "app") if path.is_dir() else (path.parent, path.stem)
    return partial(load_component, folder.parent, folder.name, module, attribute)


def pickled_factory(factory: AppFactory) -> bytes:
    """Return an app factory in the form in which it is sent to a worker process.

    Raises:
        UserError: If a worker could not find it.
    """
    try:
        return pickle.dumps(as_callable(factory))
    except Exception as error:
        problem = Problem(
            path="app_factory",
            expected="must be (path, attribute) or a function of an importable module, for worker processes to find it",
            got=f"{factory!r} ({error})",
        )
        raise UserError([problem]) from None
