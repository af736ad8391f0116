"""What the documents say is what the code says."""

import inspect
import re
from pathlib import Path

import pytest
from documents import PAGES
from helpers import REPOSITORY

import aiokv
import aiokv.testing
from aiokv.limits import MAX_ENTRY_PATH_BYTES, MAX_TTL_SECONDS, MAX_VALUE_BYTES, MIN_TTL_SECONDS
from aiokv.testing import Fault
from aiokv.wire import TRANSIENT_STATUSES


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def test_error_tree_is_that_of_the_code() -> None:
    assert (aiokv.errors.__doc__ or "").split("```")[1].strip() in page("docs/errors.md")


def test_limits_are_those_of_the_code() -> None:
    stores = page("docs/stores.md")
    for number in (MAX_VALUE_BYTES, MAX_ENTRY_PATH_BYTES, MAX_TTL_SECONDS):
        assert f"{number:,}" in stores
    assert f"{MIN_TTL_SECONDS} to {MAX_TTL_SECONDS:,}" in stores


def test_statuses_that_are_retried_are_those_of_the_code() -> None:
    listed = re.search(r"the statuses ([0-9, and]+?), with", page("docs/errors.md"))
    assert listed is not None
    assert {int(status) for status in re.findall(r"\d+", listed[1])} == TRANSIENT_STATUSES


def test_retry_policy_is_that_of_the_code() -> None:
    policy = aiokv.RetryPolicy()
    sentence = (
        f"A call is tried {policy.attempts} times within {policy.total_timeout:g} seconds, an attempt takes at most "
        f"{policy.attempt_timeout:g}, a connection {policy.connect_timeout:g}"
    )
    assert sentence in " ".join(page("docs/errors.md").split())


def test_options_of_the_decorators_are_all_described_with_their_defaults() -> None:
    parameters = {
        **inspect.signature(aiokv.kv_cached).parameters,
        **inspect.signature(aiokv.kv_cached_many).parameters,
    }
    described = dict(re.findall(r"^### `(\w+)`\n\*(.*)", page("docs/caching-options.md"), re.MULTILINE))
    assert described.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert described[name].startswith(_shown(parameter.default)), name


def _shown(default: object) -> str:
    if default is inspect.Parameter.empty:
        return "No default"
    if default is ...:
        return "Default `...`"
    if default == (Exception,):
        return "Default `(Exception,)`"
    if isinstance(default, str):
        return f'Default `"{default}"`'
    if isinstance(default, int | float):
        return f"Default {default:g}"
    return f"Default {default}" if default is None else f"Default `{default}`"


def test_every_exception_has_advice() -> None:
    advised = set(re.findall(r"^\| `(\w+Error)`", page("docs/errors.md"), re.MULTILINE))
    assert {name for name in aiokv.__all__ if name.endswith("Error")} - advised == {"AioKVError", "CallError"}


def test_every_fault_is_in_the_table() -> None:
    faults = [given for given in vars(aiokv.testing).values() if isinstance(given, type) and issubclass(given, Fault)]
    assert [
        fault.__name__ for fault in faults if fault is not Fault and f"`{fault.__name__}(" not in page("docs/testing.md")
    ] == []


def test_files_that_the_page_for_contributors_names_are_there() -> None:
    named = re.findall(r"`([\w/]+(?:\.py|/))`", page("docs/how-it-is-built.md"))
    there = [str(path) for top in ("aiokv", "examples", "tests") for path in (REPOSITORY / top).glob("**/*")]
    assert len(named) > 20
    assert [name for name in named if not any(path.endswith(f"/{name.rstrip('/')}") for path in there)] == []


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for path in PAGES:
        prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"https?:", target)]
        broken += [(path.name, target) for target in targets if not leads_somewhere(path, target)]
    assert broken == []


def leads_somewhere(page_path: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    path = page_path.parent / name if name else page_path
    if not anchor or path.suffix != ".md":
        return path.exists()
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return anchor in {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("module", [aiokv, aiokv.testing])
def test_every_public_name_is_in_the_reference(module: object) -> None:
    reference = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs" / "reference").glob("*.md"))
    # Two pages show whole modules: the errors, the limits and the faults.
    shown = {*vars(aiokv.errors), *vars(aiokv.testing.faults), *re.findall(r"[\w]+", reference)}
    assert set(module.__all__) - shown == set()  # type: ignore[attr-defined] # a module that has it
