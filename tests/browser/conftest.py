"""A browser, and the servers whose pages it opens."""

import shutil
from pathlib import Path

import pytest
from fronts import DOORS, Front, chromium, jupyter, served


def pytest_collection_modifyitems(items):
    """Skip these tests, and say so, where there is no browser."""
    skip = pytest.mark.skip(reason="no chromedriver: install Chromium and its driver")
    for item in items:
        if Path(__file__).parent in item.path.parents and not shutil.which("chromedriver"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("downloads")) as driver:
        yield driver


@pytest.fixture(scope="session")
def notebooks(tmp_path_factory):
    with jupyter(tmp_path_factory.mktemp("jupyter")) as address:
        yield address


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    with served("page", tmp_path_factory.mktemp("page")) as address:
        yield address


@pytest.fixture(scope="module")
def door():
    return "lab"


@pytest.fixture(scope="module")
def front(door, request, browser):
    """Open the door, and wait for both explorers."""
    address = request.getfixturevalue("page" if door == "page" else "notebooks")
    front = Front(browser, door, address + DOORS[door])
    front.run_all()
    front.explorer("enlarge")
    return front


@pytest.fixture
def explorer(front):
    return front.explorer("generate")
