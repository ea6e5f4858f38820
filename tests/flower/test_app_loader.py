"""Loading a component by its path, whatever else bears its name."""

import pickle
import re
import sys

import pytest

from fedbd.errors import UserError
from fedbd.flower.app_loader import as_callable, load_component, pickled_factory
from fedbd.flower.executors import ProcessPoolExecutor, SerialExecutor


@pytest.fixture
def app_dir(tmp_path):
    """An app folder with a package ``clients`` that imports relatively."""
    folder = tmp_path / "an-app" / "clients"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("loads = []\n")
    (folder / "step.py").write_text("where = __name__\n")
    (folder / "app.py").write_text(
        "from . import loads\nfrom .step import where\nloads.append(1)\napp = ['the app', where, loads]\n"
    )
    yield folder.parent
    for name in [name for name in sys.modules if name.startswith("_fedbd_app_clients")]:
        del sys.modules[name]


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A current folder, first on the path, whose own ``clients.py`` must not be taken."""
    folder = tmp_path / "current"
    folder.mkdir()
    (folder / "clients.py").write_text("raise RuntimeError('the wrong clients')\n")
    (folder / "step.py").write_text("raise RuntimeError('the wrong step')\n")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def test_relative_imports_work_and_a_module_of_the_same_name_is_not_taken(app_dir, trap):
    text, where, _ = load_component(app_dir, "clients")
    assert text == "the app"
    assert re.fullmatch(r"_fedbd_app_clients(_[0-9a-f]{8})?\.step", where)  # the digest: another test loaded a namesake
    assert "clients" not in sys.modules


def test_a_component_is_loaded_once(app_dir):
    first = load_component(app_dir, "clients")
    again = load_component(app_dir / ".." / app_dir.name, "clients")
    assert again is first
    assert first[2] == [1]
    assert load_component(app_dir, "clients", "step", "where") == first[1]


def test_a_package_of_the_same_name_elsewhere_is_another(app_dir, tmp_path):
    other = tmp_path / "other" / "clients"
    other.mkdir(parents=True)
    (other / "app.py").write_text("app = __name__\n")  # and no __init__.py
    first = load_component(app_dir, "clients")
    name = load_component(tmp_path / "other", "clients")
    assert name.startswith("_fedbd_app_clients_")
    assert load_component(app_dir, "clients") is first
    assert load_component(tmp_path / "other", "clients") is name


@pytest.mark.parametrize(
    ("package", "module", "attribute", "expected"),
    [
        ("server", "app", "app", "server/app.py: must be the Python file of a Flower component; it is missing"),
        ("clients", "main", "app", "clients/main.py: must be the Python file"),
        ("clients", "app", "application", "clients/app.py: must define `application`; it does not"),
    ],
)
def test_what_is_missing_is_named(app_dir, package, module, attribute, expected):
    with pytest.raises(UserError, match=expected):
        load_component(app_dir, package, module, attribute)


def test_a_failed_import_can_be_repeated(app_dir):
    init = app_dir / "clients" / "__init__.py"
    init.write_text("raise ValueError('not yet')\n")
    with pytest.raises(ValueError, match="not yet"):
        load_component(app_dir, "clients")
    init.write_text("loads = ['at last a list']\n")
    assert load_component(app_dir, "clients")[2] == ["at last a list", 1]


def test_a_factory_by_path_survives_pickling(app_dir):
    for path in (app_dir / "clients", app_dir / "clients" / "app.py"):
        factory = pickle.loads(pickled_factory((path, "app")))
        assert factory() is load_component(app_dir, "clients")
        assert as_callable((path, "app"))() is factory()


def test_engines_take_the_app_and_not_the_trap(app_dir, trap):
    (app_dir / "clients" / "app.py").write_text(
        "from flwr.clientapp import ClientApp\nfrom .step import where\napp = ClientApp() if where else None\n"
    )
    SerialExecutor((app_dir / "clients", "app"))
    ProcessPoolExecutor((app_dir / "clients", "app"), 1).close()
