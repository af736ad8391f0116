"""pytest's fixtures for code that uses aiokv; see "Test against faults" in the README.

A module beside the package, not in it: pytest loads it in every run, also where nothing uses aiokv, and before coverage is
measured. So nothing but pytest is imported here until a fixture is asked for. The fixtures are synchronous: they serve tests
that await, by whichever plugin, and tests that do not.
"""

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from aiokv import AsyncKVStore
    from aiokv.testing import MovableClock
    from aiokv.testing.background import FlakyKV, KVServer


@pytest.fixture
def kv_server(request: pytest.FixtureRequest) -> "Iterator[KVServer]":
    """A real server on a free port of this machine, empty, over memory; `kv_server.url` is its address.

    `@pytest.mark.parametrize("kv_server", ["memory", "sqlite"], indirect=True)` runs a test over a SQLite file, too.
    """
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

    The store's namespace is that of `kv_store`, which sees what the server holds. The waits between attempts are taken out, for
    the whole process while the test runs, and an attempt takes at most a second.
    """
    from aiokv import AsyncKVStore  # noqa: PLC0415 (see above)
    from aiokv.backends.http.retry import reset_quotas  # noqa: PLC0415 (see above)
    from aiokv.testing import FaultProxy, disable_backoff  # noqa: PLC0415 (see above)
    from aiokv.testing.background import FLAKY_RETRY, FlakyKV, in_thread  # noqa: PLC0415 (see above)

    # Another test may have spent the quota of a port that has come round again.
    reset_quotas()
    with disable_backoff(), in_thread(lambda: FaultProxy(kv_server.url)) as proxy:
        yield FlakyKV(AsyncKVStore(kv_store.db_name, url=proxy.url, retry=FLAKY_RETRY), proxy)
