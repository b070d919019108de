"""One list of dependencies, one address, and a package that stands on its own."""

import email
import json
import os
import re
import subprocess
import sys
import urllib.parse
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from PIL import Image

import arbscale
from arbscale import store

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"matplotlib": "matplotlib-base", "torch": "pytorch-cpu"}
# What surely is there. prdc and torch-fidelity 0.4 were not found, and lpips brings OpenCV along.
CONDA_FORGE = set(
    "accelerate anywidget diffusers editables hatchling ipywidgets jupyterlab matplotlib-base "
    "nbval notebook numpy packaging pillow pip pooch pytest pytest-cov pytest-xdist python "
    "pytorch-cpu pyyaml ruff safetensors scikit-image selenium tensorboard tifffile torchvision "
    "tqdm tyro voila".split()
)
SUPPORTED = SpecifierSet(PROJECT["requires-python"])
PYTHONS = [f"3.{minor}" for minor in range(30) if f"3.{minor}.9" in SUPPORTED]


def requirements() -> list[Requirement]:
    """Every direct dependency of pyproject.toml, the extras' too."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in sum(extras, PROJECT["dependencies"])]


def applies(requirement: Requirement, python: str) -> bool:
    """Whether a requirement concerns Linux with that Python, such as "3.10"."""
    here = {"python_version": python, "python_full_version": f"{python}.9"}
    machine = {"sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix"}
    return requirement.marker is None or requirement.marker.evaluate(here | machine)


def clean_environment(**more: str) -> dict[str, str]:
    """Environment variables in which nothing points at this checkout or at larger data."""
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "ARBSCALE_DATA", "ARBSCALE_WEIGHTS")
    return {k: v for k, v in os.environ.items() if k not in dropped} | more


@pytest.mark.parametrize("version", ["0.9.0", "0.9.29", "1.0.0", "1.0.8"])
def test_a_tyro_that_is_empty_or_cannot_read_our_commands_is_out_of_bounds(version):
    [tyro] = [r for r in requirements() if r.name == "tyro"]
    assert version not in tyro.specifier


# The lock -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lock() -> str:
    return (ROOT / "requirements.lock").read_text()


@pytest.fixture(scope="module")
def pins(lock) -> list[Requirement]:
    """Return the pinned requirements, after a look that each has a hash."""
    lines = [line for line in lock.splitlines() if line and not line.lstrip().startswith("#")]
    entries = "\n".join(lines).replace("\\\n", " ").splitlines()
    assert all("--hash=sha256:" in entry for entry in entries)
    return [Requirement(entry.split("--hash")[0]) for entry in entries]


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_each_dependency_once_within_its_bounds(pins, python):
    for wanted in requirements():
        if not applies(wanted, python):
            continue
        name = canonicalize_name(wanted.name)
        found = [p for p in pins if canonicalize_name(p.name) == name and applies(p, python)]
        assert len(found) == 1, f"{name} for Python {python}: {len(found)} pins; run: make lock"
        version = str(found[0].specifier).removeprefix("==")
        assert version in wanted.specifier, f"{found[0]} is not {wanted}; run: make lock"


def test_lock_names_no_address(lock):
    assert "://" not in lock
    assert not re.search(r"^\s*(-i|--(extra-)?index|--find-links|-f)\b", lock, re.MULTILINE)


# The conda environment ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conda() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_conda_uses_conda_forge_alone_and_installs_the_checkout_last(conda):
    assert conda["channels"] == ["conda-forge", "nodefaults"]
    assert conda["dependencies"][-1]["pip"][-1] == "-e ."


def test_conda_asks_conda_forge_for_what_it_has(conda):
    *lines, last = conda["dependencies"]
    assert {re.match(r"[\w-]+", line)[0] for line in lines} <= CONDA_FORGE
    assert not CONDA_FORGE & {re.match(r"[\w-]*", line)[0] for line in last["pip"]}


def test_conda_asks_for_the_same_packages_with_the_same_bounds(conda):
    *lines, last = conda["dependencies"]
    lines += last["pip"][:-1]  # what conda-forge does not carry
    specs = [Requirement(re.sub(r"(?<![=<>!])=(?!=)", "==", s)) for s in lines]
    found = {spec.name: str(spec.specifier) for spec in specs}
    python = found.pop("python").removeprefix("==")
    assert python in PYTHONS
    assert found.pop("pip") == ""
    wanted = [r for r in requirements() if applies(r, python)]
    assert found == {CONDA_NAMES.get(r.name, r.name): str(r.specifier) for r in wanted}


# The repository's address -------------------------------------------------------------------------

HOSTED = re.compile(
    r"colab\.research\.google\.com/github/(?P<colab>[^\s\"'<>)\\]+)"
    r"|mybinder\.org/v2/(?P<binder>[^\s\"'<>)\\]+)"
    r"|(?:github\.com|raw\.githubusercontent\.com)/(?P<git>[\w.-]+/arbscale)(?![\w-])"
)


def _wrong_addresses(text: str) -> list[str]:
    """Return the links to a hosted copy of this repository that do not follow the constant."""
    repository, branch = arbscale.REPOSITORY, arbscale.BRANCH
    wrong = []
    for link in HOSTED.finditer(text):
        if link["colab"]:
            prefix = f"{repository}/blob/{branch}/"
            path = link["colab"].removeprefix(prefix)
            good = link["colab"].startswith(prefix) and (ROOT / path).is_file()
        elif link["binder"]:
            head, _, query = link["binder"].partition("?")
            path = urllib.parse.parse_qs(query).get("labpath", ["."])[0]
            good = head == f"gh/{repository}/{branch}" and (ROOT / path).exists()
        else:
            good = link["git"] == repository
        if not good:
            wrong.append(link[0])
    return wrong


def test_every_link_to_the_repository_follows_the_constant():
    names = ("README.md", "CONTRIBUTING.md", "CITATION.cff", "pyproject.toml")
    files = [ROOT / name for name in names]
    files += sorted((ROOT / "notebooks").glob("*.ipynb"))
    wrong = {f.name: _wrong_addresses(f.read_text("utf8")) for f in files if f.exists()}
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize(
    "link",
    [
        "https://colab.research.google.com/github/someone/arbscale/blob/main/README.md",
        "https://colab.research.google.com/github/{}/blob/main/notebooks/missing.ipynb",
        "https://colab.research.google.com/github/{}/blob/elsewhere/pyproject.toml",
        "https://mybinder.org/v2/gh/someone/arbscale/main",
        "https://mybinder.org/v2/gh/{}/main?labpath=notebooks%2Fmissing.ipynb",
        "git+https://github.com/someone/arbscale.git",
    ],
)
def test_a_wrong_link_is_found(link):
    assert _wrong_addresses(f"see ({link.format(arbscale.REPOSITORY)}).")


def test_a_right_link_passes():
    good = arbscale.REPOSITORY, arbscale.BRANCH
    text = """
    [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](
    https://colab.research.google.com/github/{0}/blob/{1}/pyproject.toml)
    [![Binder](https://mybinder.org/badge_logo.svg)](
    https://mybinder.org/v2/gh/{0}/{1}?labpath=tests%2Ftest_environment.py)
    pip install git+https://github.com/{0}.git and https://github.com/jinseokK/other
    """
    assert _wrong_addresses(text.format(*good)) == []


# The package --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_importing_needs_torch_numpy_safetensors_and_tqdm_alone():
    blocked = "matplotlib skimage scipy lpips ipywidgets PIL torchvision IPython diffusers".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import arbscale"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel with the tools that are installed: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env=clean_environment(), timeout=120)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_carries_the_package_and_its_weights(wheel):
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "arbscale").rglob("*.*")}
    code = {name for name in code if name.endswith((".py", ".js", ".css", ".html"))}
    data = ROOT / "data"
    files = {path.relative_to(data) for path in data.rglob("*.*") if path.suffix != ".py"}
    shipped = {f"arbscale/shipped/{path}" for path in files}
    wanted = (code | shipped) - {"arbscale/shipped/README.md", "arbscale/shipped/explorer.webp"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("arbscale/")}
    assert packed == wanted


@pytest.mark.slow
def test_the_wheel_names_the_licences_of_its_weights(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(archive.read(name))["License-Expression"].split(" AND ")
    licences = {arbscale.load(model).manifest["licence"] for model in store.shipped()}
    assert told[0] == "MIT" and len(told) == len(licences)  # that of the scenes is the code's
    for name in told:
        words = name.removeprefix("LicenseRef-").replace("-", " ")
        assert any(words in licence.replace("-", " ") for licence in licences)


@pytest.fixture(scope="module")
def home(wheel, tmp_path_factory) -> Path:
    """Install the wheel into a folder of its own."""
    folder = tmp_path_factory.mktemp("home")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True, timeout=120)
    return folder


def outside(home: Path, folder: Path, *words: str) -> str:
    """Run Python in a folder outside the checkout with the installed wheel; return its output."""
    options = {"cwd": folder, "env": clean_environment(PYTHONPATH=str(home)), "timeout": 300}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_loads_every_shipped_model_outside_the_checkout(home, tmp_path):
    code = """
import json, arbscale, arbscale.store
loaded = [name for name in arbscale.store.shipped() if arbscale.load(name)]
print(json.dumps({"file": arbscale.__file__, "loaded": loaded}))
"""
    told = json.loads(outside(home, tmp_path, "-c", code))
    assert Path(told["file"]).is_relative_to(home)
    assert told["loaded"] == arbscale.store.shipped()
    assert told["loaded"]


@pytest.mark.slow
def test_the_wheel_runs_the_demo_outside_the_checkout(home, tmp_path):
    assert "outputs/demo.png" in outside(home, tmp_path, "-m", "arbscale", "demo")
    with Image.open(tmp_path / "outputs/demo.png") as sheet:
        assert sheet.width > 4 * 300


# The Makefile -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trick", "said"),
    [
        ("sys.version_info = (3, 8, 18, 'final', 0)", r"3\.8\b.* 3\.10 "),
        ("sys.version_info = (3, 14, 0, 'final', 0)", r"3\.14\b.* 3\.10 "),
        ("sys.modules['ensurepip'] = None", r"\bvenv\b"),
        (None, r"/fake-python\b"),
    ],
)
def test_an_unfit_python_gives_one_line_that_names_the_mend(tmp_path, trick, said):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).symlink_to(ROOT / name)
    fake = tmp_path / "fake-python"
    if trick:
        code = f"import sys; {trick}; exec(sys.argv[1])"
        fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$2"\n')
        fake.chmod(0o755)
    command = ["make", "lint", f"PYTHON={fake}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert len(lines) == 1
    assert re.search(said, lines[0])
    assert "make PYTHON=" in lines[0]
    assert not (tmp_path / ".venv").exists()
