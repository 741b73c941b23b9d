"""One list of pinned versions, and an installation that follows it."""

import re
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cellseg_helpers.config import ROOT

LINES = (ROOT / "requirements.txt").read_text().splitlines()
PINS = {canonicalize_name(Requirement(line).name): Requirement(line) for line in LINES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ONLY_BESIDE_A_GPU_BUILD_OF_TORCH = ("nvidia-", "cuda-", "triton")


def test_requirements_are_pinned_versions_and_nothing_else():
    pinned = re.compile(r"[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.]*( ; .+)?")
    assert not [line for line in LINES if not pinned.fullmatch(line)]
    names = [Requirement(line).name for line in LINES]
    assert names == sorted(set(names))


@pytest.mark.parametrize(
    "file", ["requirements.txt", "environment.yml", "pyproject.toml", "Makefile"]
)
def test_no_package_host_is_named(file):
    text = (ROOT / file).read_text()
    assert not re.search(
        r"https?://|index-url [^=\s-]|--(extra-)?index|find-links|trusted-host|\.org/simple", text
    )


def test_every_dependency_is_pinned():
    declared = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    assert not {canonicalize_name(Requirement(text).name) for text in declared} - PINS.keys()


def test_conda_users_get_the_same_list():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.txt", "-e ."]}
    assert [re.split("[=<>]", package)[0] for package in conda] == ["python", "pip"]
    python = re.fullmatch(r"python=(\d+\.\d+)", conda[0])
    assert python and Version(python[1]) >= Version(PROJECT["requires-python"].removeprefix(">="))


def test_pins_hold_for_every_python_that_the_project_takes():
    assert Version("3.11") in Requirement(f"python{PROJECT['requires-python']}").specifier
    for pin in PINS.values():
        assert len(pin.specifier) == 1 and not pin.extras and not pin.url


def test_the_installed_versions_are_the_pinned_ones():
    """A local build, such as torch's for CPUs, counts as its public version and needs no CUDA
    libraries.
    """
    wrong = {}
    for name, pin in PINS.items():
        if pin.marker is None or pin.marker.evaluate():
            try:
                installed = Version(metadata.version(name)).public
            except metadata.PackageNotFoundError:
                installed = "missing"
            optional = installed == "missing" and name.startswith(ONLY_BESIDE_A_GPU_BUILD_OF_TORCH)
            if not optional and str(pin.specifier) != f"=={installed}":
                wrong[name] = (str(pin.specifier), installed)
    assert wrong == {}
