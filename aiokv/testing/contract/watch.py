"""What a backend promises that tells of changes."""

import asyncio
import contextlib
from typing import ClassVar, Final

import pytest

from aiokv.backends.base import Backend
from aiokv.backends.capabilities import MAX_BATCH_KEYS, Entry, WatchBackend, capabilities_of
from aiokv.backends.watching import HEARTBEAT_SECONDS, MAX_QUEUED_CHANGES, Alive, Changed, Lost, Watch, WatchEvent
from aiokv.testing.contract.suite import ContractSuite

_PATIENCE_SECONDS: Final = 15.0
_TICK_SECONDS: Final = 0.1


async def begun(watch: Watch) -> Watch:
    """Wait until a watch tells of changes.

    Args:
        watch: A new watch.

    Returns:
        It.
    """
    async with asyncio.timeout(_PATIENCE_SECONDS):
        event = await anext(watch)
    assert isinstance(event, Lost), f"the first event is {event}"
    return watch


async def events_until(watch: Watch, key: str) -> list[WatchEvent]:
    """Read a watch up to a change of a key.

    Args:
        watch: The watch.
        key: The key.

    Returns:
        The events before it, without heartbeats.
    """
    events: list[WatchEvent] = []
    async with asyncio.timeout(_PATIENCE_SECONDS):
        async for event in watch:
            if isinstance(event, Changed) and event.key == key:
                return events
            if not isinstance(event, Alive):
                events.append(event)
    raise AssertionError(f"the watch ended after {len(events)} events")


async def _next_within(watch: Watch, seconds: float) -> WatchEvent:
    """Read an event; time in which a busy machine lets this process do nothing does not count."""
    reading = asyncio.ensure_future(anext(watch))
    try:
        for _ in range(round(seconds / _TICK_SECONDS)):
            await asyncio.wait([reading], timeout=_TICK_SECONDS)
            if reading.done():
                return reading.result()
    finally:
        reading.cancel()
    raise AssertionError(f"the watch is silent for {seconds:g} s")


class WatchContract(ContractSuite):
    """The promises of `WatchBackend`."""

    closes_watches: ClassVar[bool] = True
    """Whether `aclose` of the backend ends its watches."""

    @pytest.fixture
    def watching(self, backend: Backend) -> WatchBackend:
        """The backend's capability."""
        found = capabilities_of(backend).watch
        assert found is not None, "the backend has no WatchBackend"
        return found

    async def test_watch_begins_with_lost_and_then_tells_of_every_change(
        self, backend: Backend, watching: WatchBackend
    ) -> None:
        await backend.set("db", "before", "v", 60)
        async with watching.watch("db") as watch:
            await begun(watch)
            await backend.set("db", "k", "v", 60)
            await backend.set("db", "end", "v", 60)
            assert await events_until(watch, "end") == [Changed("k")]

    async def test_changes_of_a_key_come_in_the_order_of_their_commits(self, backend: Backend, watching: WatchBackend) -> None:
        async with watching.watch("db") as watch:
            await begun(watch)
            for _ in range(3):
                await backend.set("db", "k", "v", 60)
                await backend.set("db", "k", "w", 60)
                await backend.delete("db", "k")
            await backend.set("db", "end", "v", 60)
            expected = [Changed("k"), Changed("k"), Changed("k", is_delete=True)] * 3
            assert await events_until(watch, "end") == expected

    async def test_change_is_told_after_it_can_be_read(self, backend: Backend, watching: WatchBackend) -> None:
        async with watching.watch("db") as watch:
            await begun(watch)

            async def write() -> None:
                for i in range(20):
                    await backend.set("db", f"k{i}", "v", 60)

            writer = asyncio.create_task(write())
            read: list[str | None] = []
            async with asyncio.timeout(_PATIENCE_SECONDS):
                async for event in watch:
                    if isinstance(event, Changed):
                        read.append(await backend.get("db", event.key))
                        if event.key == "k19":
                            break
            await writer
            assert read == ["v"] * 20

    @pytest.mark.parametrize("key", ["é", "😀", "a b", "a\nb", "data: x", "\uffff", '"', "x" * 1000], ids=ascii)
    async def test_odd_keys_are_told_as_they_are(self, backend: Backend, watching: WatchBackend, key: str) -> None:
        async with watching.watch("a b") as watch:
            await begun(watch)
            await backend.set("a b", key, "v", 60)
            await backend.delete("a b", key)
            await backend.set("a b", "end", "v", 60)
            assert await events_until(watch, "end") == [Changed(key), Changed(key, is_delete=True)]

    async def test_changes_of_other_namespaces_are_not_told(self, backend: Backend, watching: WatchBackend) -> None:
        async with watching.watch("db") as watch:
            await begun(watch)
            for other in ("other", "d", "db2", "db:", "DB"):
                await backend.set(other, "k", "v", 60)
            await backend.set("db", "end", "v", 60)
            assert await events_until(watch, "end") == []

    async def test_two_watches_are_both_told(self, backend: Backend, watching: WatchBackend) -> None:
        async with watching.watch("db") as one, watching.watch("db") as two:
            await begun(one)
            await begun(two)
            await backend.set("db", "k", "v", 60)
            await backend.set("db", "end", "v", 60)
            assert await events_until(one, "end") == [Changed("k")]
            assert await events_until(two, "end") == [Changed("k")]

    async def test_end_of_one_watch_leaves_another_alone(self, backend: Backend, watching: WatchBackend) -> None:
        async with watching.watch("db") as one:
            await begun(one)
            async with watching.watch("db") as two:
                await begun(two)
            await backend.set("db", "k", "v", 60)
            await backend.set("db", "end", "v", 60)
            assert await events_until(one, "end") == [Changed("k")]

    async def test_batches_and_clearing_are_told(self, backend: Backend, watching: WatchBackend) -> None:
        batch, scan = capabilities_of(backend).batch, capabilities_of(backend).scan
        if batch is None or scan is None:
            pytest.skip("the backend has no BatchBackend or no ScanBackend")
        async with watching.watch("db") as watch:
            await begun(watch)
            await batch.set_many("db", [Entry(key, "v", 60) for key in "abc"])
            await batch.delete_many("db", ["b"])
            await scan.clear("db", "a")
            await backend.set("db", "end", "v", 60)
            events = await events_until(watch, "end")
        assert sorted(events[:3], key=repr) == [Changed("a"), Changed("b"), Changed("c")]
        assert events[3:] == [Changed("b", is_delete=True), Changed("a", is_delete=True)]

    async def test_claims_are_no_changes(self, backend: Backend, watching: WatchBackend) -> None:
        claims = capabilities_of(backend).claim
        if claims is None:
            pytest.skip("the backend has no ClaimBackend")
        async with watching.watch("db") as watch:
            await begun(watch)
            await claims.claim("db", "k", "me", 30)
            await claims.release("db", "k", "me")
            await backend.set("db", "end", "v", 60)
            assert await events_until(watch, "end") == []

    async def test_watch_that_nobody_reads_loses_changes_with_a_word_and_goes_on(
        self, backend: Backend, watching: WatchBackend
    ) -> None:
        keys = [f"k{i}" for i in range(MAX_QUEUED_CHANGES + MAX_BATCH_KEYS)]
        batch = capabilities_of(backend).batch
        async with watching.watch("db") as watch:
            await begun(watch)
            for start in range(0, len(keys), MAX_BATCH_KEYS):
                part = keys[start : start + MAX_BATCH_KEYS]
                if batch is None:
                    await asyncio.gather(*(backend.set("db", key, "v", 60) for key in part))
                else:
                    await batch.set_many("db", [Entry(key, "v", 60) for key in part])
            await backend.set("db", "end", "v", 60)
            events = await events_until(watch, "end")
            await backend.set("db", "later", "v", 60)
            await backend.set("db", "end", "v", 60)
            assert (await events_until(watch, "end"))[-1:] == [Changed("later")]
        told = {event.key for event in events if isinstance(event, Changed)}
        assert Lost() in events or told == set(keys)

    async def test_silent_watch_says_that_it_is_alive(self, watching: WatchBackend) -> None:
        async with watching.watch("db") as watch:
            await begun(watch)
            assert await _next_within(watch, HEARTBEAT_SECONDS * 4) == Alive()

    async def test_closed_watch_ends_for_the_task_that_reads_it(self, backend: Backend, watching: WatchBackend) -> None:
        watch = await begun(watching.watch("db"))

        async def read() -> list[WatchEvent]:
            return [event async for event in watch if not isinstance(event, Alive)]

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        await watch.aclose()
        await watch.aclose()
        async with asyncio.timeout(_PATIENCE_SECONDS):
            assert await reader == []
        await backend.set("db", "k", "v", 60)
        with pytest.raises(StopAsyncIteration):
            await anext(watch)

    async def test_closed_backend_ends_its_watches(self, backend: Backend, watching: WatchBackend) -> None:
        if not self.closes_watches:
            pytest.skip("the backend does not promise it")
        watch = await begun(watching.watch("db"))
        await backend.aclose()
        with contextlib.suppress(StopAsyncIteration):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while True:
                    assert not isinstance(await anext(watch), Changed)
        assert watch.is_closed
