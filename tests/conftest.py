"""Registries, and schedulers on them; what runs on every database has a parameter for each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import postgres
from tests.postgres import database
from tests.scheduler import Place
from zoo.registry import Registry, open_registry


def pytest_configure() -> None:
    # llama.cpp's threads else spin while they wait for one another: beside two busy programs, on two
    # processors, a run took seven times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_unconfigure() -> None:
    postgres.stop()


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty registry's file; a copy of it takes a tenth of the time that its migrations take."""
    path = tmp_path_factory.mktemp("fresh") / "registry.db"
    open_registry(str(path)).engine.dispose()
    return path


@pytest.fixture(scope="session")
def fresh_postgres() -> str:
    """An empty registry's URL, the template of others."""
    url = database()
    open_registry(url).engine.dispose()
    return url


@pytest.fixture
def in_sqlite(tmp_path: Path, fresh: Path) -> Registry:
    """A registry in SQLite's file `registry.db`."""
    shutil.copy(fresh, tmp_path / "registry.db")
    return open_registry(str(tmp_path / "registry.db"))


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest) -> Iterator[Registry]:
    """A registry in each of the databases."""
    if request.param == "sqlite":
        yield request.getfixturevalue("in_sqlite")
        return
    found = open_registry(database(template=request.getfixturevalue("fresh_postgres")))
    yield found
    found.engine.dispose()


@pytest.fixture
def place(tmp_path: Path, opened: Registry) -> Place:
    """Of a scheduler with its registry in each of the databases."""
    return Place(tmp_path, opened.url)


@pytest.fixture
def in_file(tmp_path: Path, in_sqlite: Registry) -> Place:
    """Of a scheduler with its registry in a file."""
    return Place(tmp_path, in_sqlite.url)
