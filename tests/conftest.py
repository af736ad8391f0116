"""Fixtures that every test sees."""

from pathlib import Path

import pytest
from helpers import FakeClock
from hypothesis import settings

from aiokv.backends.http.retry import reset_quotas

# Machines differ in speed; the time limit of a test is pytest's. Derandomised, so that a failure is the same everywhere.
settings.register_profile("aiokv", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("aiokv")


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep tests from the user's own credentials and store; give the home folder that stands in."""
    home = tmp_path_factory.mktemp("home")
    for name in (
        "AIOKV_KEY",
        "AIOKV_URL",
        "FAL_CONFIG_PATH",
        "FAL_FORCE_AUTH_BY_USER",
        "FAL_HOME_DIR",
        "FAL_HOST",
        "FAL_KEY",
        "FAL_KEY_ID",
        "FAL_KEY_SECRET",
        "FAL_PROFILE",
        "FAL_REST_HOST",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def full_retry_quotas() -> None:
    """Keep tests from what others have spent on a port that is taken again."""
    reset_quotas()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
