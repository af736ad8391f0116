"""The licences of what aiokv depends on, as `docs/licences.md` lists them, are those that the installed packages name."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata

import pytest
from helpers import REPOSITORY
from packages import OWN

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (REPOSITORY / "docs" / "licences.md").read_text(encoding="utf-8")


def requirements() -> dict[str, list[str]]:
    """Give the packages that aiokv requires, each with the extras that bring it."""
    found: dict[str, list[str]] = {}
    extras = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    for extra, lines in extras.items():
        for line in () if extra in {*OWN, "all"} else lines:
            name = re.split(r"[\[<>=;! ]", line)[0]
            if name != "aiokv":
                found.setdefault(name, []).append(extra)
    return found


def licence_of(name: str) -> str:
    """Give the licence of an installed package, in the words of its metadata."""
    about = metadata(name)
    if about["License-Expression"]:
        return str(about["License-Expression"])
    classified = [line for line in about.get_all("Classifier") or () if line.startswith("License :: OSI Approved :: ")]
    if classified:
        return ", ".join(line.rsplit(" :: ", 1)[1] for line in classified)
    return str(about["License"] or "").split("\n", 1)[0]


def families(licence: str) -> set[str]:
    """Give the licences of a text by their family names."""
    found = set(re.findall(r"Apache|BSD|GPL|ISC|MIT|MPL|PSF|Unlicense", licence.replace("Mozilla", "MPL")))
    assert found, licence
    return found


def listed() -> dict[str, tuple[str, str]]:
    """Give the extras and the licence of each package of the page."""
    rows = re.findall(r"^\| ([\w-]+) \| ([^|]*) \| ([^|]+) \|$", PAGE, re.MULTILINE)
    return {name: (extras, licence) for name, extras, licence in rows if name != "package"}


def test_every_package_that_aiokv_requires_is_listed_with_its_extras() -> None:
    shown = {name: ", ".join(f"`{extra}`" for extra in extras if extra) for name, extras in requirements().items()}
    assert {name: extras for name, (extras, _) in listed().items()} == shown


@pytest.mark.parametrize("name", sorted(requirements()))
def test_listed_licence_is_the_one_that_the_package_names(name: str) -> None:
    try:
        licence = licence_of(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed: pip install 'aiokv[dev]'")
    if not licence:
        pytest.skip(f"the metadata of {name} name no licence; that of its repository is listed")
    # The words differ from release to release.
    assert families(listed()[name][1]) == families(licence)
