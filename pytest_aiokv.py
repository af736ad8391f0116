"""pytest's fixtures for code that uses aiokv; see docs/testing.md.

This module stands beside the package, not in it: pytest loads it in every run, even where no test uses aiokv, and before
coverage begins. So it imports only pytest until a test asks for a fixture. The fixtures are synchronous, so that they serve
asynchronous tests of every plugin, and synchronous tests.
"""

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from aiokv import AsyncKVStore
    from aiokv.testing import MovableClock
    from aiokv.testing.background import FlakyKV, KVServer

# So that a failed promise shows what was seen; nothing is imported by it.
pytest.register_assert_rewrite("aiokv.testing.contract")


@pytest.fixture
def kv_server(request: pytest.FixtureRequest) -> "Iterator[KVServer]":
    """A real server on a free port of this machine, empty, over memory; `kv_server.url` is its address.

    `@pytest.mark.parametrize("kv_server", ["memory", "sqlite"], indirect=True)` runs a test over a SQLite file, too.
    """
    from aiokv.server.extra import require_extra  # noqa: PLC0415 (see above)

    require_extra("the fixture kv_server")
    from aiokv.testing.background import in_thread, kv_server  # noqa: PLC0415 (see above)

    kind = getattr(request, "param", "memory")
    if kind not in {"memory", "sqlite"}:
        raise pytest.UsageError(f"kv_server keeps its values in 'memory' or 'sqlite', not {kind!r}")
    path = request.getfixturevalue("tmp_path") / "kv_server.db" if kind == "sqlite" else None
    with in_thread(lambda: kv_server(path)) as server:
        yield server


@pytest.fixture
def kv_clock() -> "Iterator[MovableClock]":
    """The time of aiokv: `kv_clock.advance(3600)` moves it at once; see `aiokv.testing.movable_clock`."""
    from aiokv.testing import movable_clock  # noqa: PLC0415 (see above)

    with movable_clock() as clock:
        yield clock


@pytest.fixture
def kv_store(kv_server: "KVServer", monkeypatch: pytest.MonkeyPatch) -> "AsyncKVStore":
    """An `AsyncKVStore` of a namespace of its own at `kv_server`; `AIOKV_KEY` is unset for the test."""
    from aiokv import AsyncKVStore  # noqa: PLC0415 (see above)

    monkeypatch.delenv("AIOKV_KEY", raising=False)
    return AsyncKVStore(f"test-{uuid.uuid4()}", url=kv_server.url)


@pytest.fixture
def flaky_kv(kv_server: "KVServer", kv_store: "AsyncKVStore") -> "Iterator[FlakyKV]":
    """A store whose requests go through a `FaultProxy` to `kv_server`: `flaky_kv.store` and `flaky_kv.proxy`.

    The store has the namespace of `kv_store`, which shows what the server holds. While the test runs, no store of this process
    waits between attempts. An attempt of `flaky_kv.store` takes at most a second.
    """
    from aiokv import AsyncKVStore  # noqa: PLC0415 (see above)
    from aiokv.backends.http.availability import reset_hosts  # noqa: PLC0415 (see above)
    from aiokv.backends.http.retry import reset_quotas  # noqa: PLC0415 (see above)
    from aiokv.testing import FaultProxy, disable_backoff  # noqa: PLC0415 (see above)
    from aiokv.testing.background import FLAKY_RETRY, FlakyKV, in_thread  # noqa: PLC0415 (see above)

    # An earlier test may have spent the retry quota of the same port, or lost the host there.
    reset_quotas()
    reset_hosts()
    with disable_backoff(), in_thread(lambda: FaultProxy(kv_server.url)) as proxy:
        yield FlakyKV(AsyncKVStore(kv_store.db_name, url=proxy.url, retry=FLAKY_RETRY), proxy)
