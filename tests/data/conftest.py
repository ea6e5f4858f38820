import pytest


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Keep the user's cache and data folder out of the tests."""
    monkeypatch.setenv("FEDBD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDBD_DATA", raising=False)
