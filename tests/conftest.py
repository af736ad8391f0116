"""Fixtures that every test sees."""

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import FakeClock
from hypothesis import settings

from aiokv.backends.http.availability import reset_hosts
from aiokv.backends.http.retry import reset_quotas

if TYPE_CHECKING:
    from redis_servers import RedisCluster, RedisServer

# Machines differ in speed; the time limit of a test is pytest's. Derandomised, so that a failure is the same everywhere.
settings.register_profile("aiokv", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("aiokv")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--eager-tasks", action="store_true", help="run tests under asyncio.eager_task_factory (Python 3.12 or later)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        # A process of pytest-xdist ignores it, and so would the programs that tests start and interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--eager-tasks"):
        if sys.version_info < (3, 12):
            raise pytest.UsageError("--eager-tasks needs Python 3.12 or later; leave it out")
        # Registered only then: where the hook exists, it must name a factory.
        config.pluginmanager.register(EagerTasks(), "aiokv-eager-tasks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        # Processes that share a run would each see other tests.
        raise pytest.UsageError(f"an address stands in the name of {unstable[0]}; give its parameters ids=helpers.stable_id")


class EagerTasks:
    """The hook that gives each test an event loop whose tasks begin at once."""

    @staticmethod
    def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
        return {"eager": new_eager_loop}


def new_eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined] # 3.12+
    return loop


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep tests from the user's own credentials and store; give the home folder that stands in."""
    home = tmp_path_factory.mktemp("home")
    for name in (
        "AIOKV_KEY",
        "AIOKV_REDIS_PASSWORD",
        "AIOKV_REDIS_USERNAME",
        "AIOKV_URL",
        "FAL_CONFIG_PATH",
        "FAL_FORCE_AUTH_BY_USER",
        "FAL_GRPC_HOST",
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
def hosts_like_new() -> None:
    """Keep tests from what others have spent, and seen refused, on a port that is taken again."""
    reset_quotas()
    reset_hosts()


@pytest.fixture(autouse=True)
def level_of_the_log() -> Generator[None]:
    """Undo what a program that runs in a test, or a package that it imports, sets for all loggers."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="session")
def redis_server() -> "Generator[RedisServer]":
    """One server of Redis or Valkey for all tests; each empties it first."""
    from redis_servers import running_redis  # noqa: PLC0415 (few tests need it)

    with running_redis() as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster() -> "Generator[RedisCluster]":
    """One cluster for all tests; each empties it first, and breaks nothing."""
    from redis_servers import running_cluster  # noqa: PLC0415 (likewise)

    with running_cluster() as cluster:
        yield cluster
