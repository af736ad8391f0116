"""What a backend promises that takes many keys in one step."""

import asyncio

import pytest

from aiokv.backends.base import Backend
from aiokv.backends.capabilities import MAX_BATCH_BYTES, MAX_BATCH_KEYS, OMITTED, BatchBackend, Entry, capabilities_of
from aiokv.limits import MAX_TTL_SECONDS, MAX_VALUE_BYTES
from aiokv.testing.contract.suite import ODD_KEYS, ContractSuite, Passing


class BatchContract(ContractSuite):
    """The promises of `BatchBackend`."""

    @pytest.fixture
    def batch(self, backend: Backend) -> BatchBackend:
        """The backend's capability."""
        found = capabilities_of(backend).batch
        assert found is not None, "the backend has no BatchBackend"
        return found

    async def test_batch_outcomes_stand_in_the_order_of_the_keys(self, batch: BatchBackend) -> None:
        outcomes = await batch.set_many("db", [Entry(f"k{i}", f"v{i}", 60) for i in range(0, 20, 2)])
        assert list(outcomes) == [None] * 10
        keys = [f"k{i}" for i in reversed(range(20))]
        assert list(await batch.get_many("db", keys)) == [None if i % 2 else f"v{i}" for i in reversed(range(20))]

    async def test_batch_and_single_calls_see_each_other(self, backend: Backend, batch: BatchBackend) -> None:
        await backend.set("db", "single", "1", 60)
        await batch.set_many("db", [Entry("batched", "2", 60)])
        assert await backend.get("db", "batched") == "2"
        assert list(await batch.get_many("db", ["single", "batched"])) == ["1", "2"]
        await backend.delete("db", "batched")
        await batch.delete_many("db", ["single"])
        assert (await backend.get("db", "single"), *await batch.get_many("db", ["batched"])) == (None, None)

    async def test_batch_of_deletes_succeeds_for_absent_keys_too(self, batch: BatchBackend) -> None:
        await batch.set_many("db", [Entry("a", "1", 60), Entry("b", "2", 60), Entry("c", "3", 60)])
        assert list(await batch.delete_many("db", ["a", "absent", "c"])) == [None] * 3
        assert list(await batch.get_many("db", ["a", "b", "c"])) == [None, "2", None]

    async def test_key_twice_in_a_batch_of_sets_has_the_last_value_and_life(
        self, batch: BatchBackend, passing: Passing
    ) -> None:
        life = passing.life_seconds
        entries = [Entry("k", "first", MAX_TTL_SECONDS), Entry("other", "1", 600), Entry("k", "last", life)]
        assert list(await batch.set_many("db", entries)) == [None] * 3
        assert list(await batch.get_many("db", ["k", "other"])) == ["last", "1"]
        await passing.wait(1)
        assert list(await batch.get_many("db", ["k", "other"])) == [None, "1"]

    async def test_key_twice_in_a_batch_of_gets_or_deletes_has_two_outcomes(self, batch: BatchBackend) -> None:
        await batch.set_many("db", [Entry("k", "v", 60)])
        assert list(await batch.get_many("db", ["k", "absent", "k"])) == ["v", None, "v"]
        assert list(await batch.delete_many("db", ["k", "k"])) == [None, None]
        assert list(await batch.get_many("db", ["k"])) == [None]

    async def test_batched_entries_expire_each_at_its_own_time(self, batch: BatchBackend, passing: Passing) -> None:
        await batch.set_many("db", [Entry("short", "1", passing.life_seconds), Entry("long", "2", 600)])
        await passing.wait(0.5)
        assert list(await batch.get_many("db", ["short", "long"])) == ["1", "2"]
        await passing.wait(0.5)
        assert list(await batch.get_many("db", ["short", "long"])) == [None, "2"]

    async def test_batches_of_one_namespace_leave_others_alone(self, batch: BatchBackend) -> None:
        await batch.set_many("one", [Entry("k", "1", 60)])
        await batch.set_many("two", [Entry("k", "2", 60)])
        await batch.delete_many("one", ["k"])
        assert (*await batch.get_many("one", ["k"]), *await batch.get_many("two", ["k"])) == (None, "2")

    async def test_odd_keys_in_one_batch_each_name_their_own_entry(self, backend: Backend, batch: BatchBackend) -> None:
        await batch.set_many("db", [Entry(key, f"value of {key}", 60) for key in ODD_KEYS])
        expected = [f"value of {key}" for key in ODD_KEYS]
        assert list(await batch.get_many("db", ODD_KEYS)) == expected
        assert [await backend.get("db", key) for key in ODD_KEYS] == expected
        await batch.delete_many("db", ODD_KEYS[::2])
        assert list(await batch.get_many("db", ODD_KEYS[1::2])) == expected[1::2]
        assert list(await batch.get_many("db", ODD_KEYS[::2])) == [None] * len(ODD_KEYS[::2])

    async def test_batch_of_the_most_keys_is_done_whole(self, batch: BatchBackend) -> None:
        keys = [f"k{i}" for i in range(MAX_BATCH_KEYS)]
        assert list(await batch.set_many("db", [Entry(key, key, 60) for key in keys])) == [None] * MAX_BATCH_KEYS
        assert list(await batch.get_many("db", keys)) == keys
        assert list(await batch.delete_many("db", keys)) == [None] * MAX_BATCH_KEYS
        assert list(await batch.get_many("db", keys)) == [None] * MAX_BATCH_KEYS

    @pytest.mark.parametrize("char", ["x", "😀", '"'], ids=ascii)
    async def test_answer_beyond_the_most_bytes_omits_values_that_come_when_asked_again(
        self, backend: Backend, batch: BatchBackend, char: str
    ) -> None:
        value = char * (MAX_VALUE_BYTES // len(char.encode()))
        keys = [f"k{i}" for i in range(6)]
        for key in keys:
            await backend.set("db", key, value, 60)
        left, rounds = keys, 0
        while left:
            outcomes = await batch.get_many("db", [*left, "absent"])
            came = [outcome for outcome in outcomes if outcome is not OMITTED]
            assert outcomes[0] is not OMITTED
            assert sum(len(text.encode()) for text in came if isinstance(text, str)) <= MAX_BATCH_BYTES
            are_right = all(outcome == value for outcome in outcomes[:-1] if outcome is not OMITTED)
            assert are_right
            assert outcomes[-1] in {None, OMITTED}
            left = [key for key, outcome in zip(left, outcomes, strict=False) if outcome is OMITTED]
            rounds += 1
        assert rounds > 1

    async def test_batch_of_sets_of_the_most_bytes_is_stored(self, batch: BatchBackend) -> None:
        value = "x" * (MAX_VALUE_BYTES - 10)
        assert list(await batch.set_many("db", [Entry(f"k{i}", value, 60) for i in range(4)])) == [None] * 4
        same = list(await batch.get_many("db", ["k0", "k3"])) == [value, value]
        assert same

    async def test_batches_and_single_writes_take_effect_in_their_order(self, backend: Backend, batch: BatchBackend) -> None:
        for i in range(20):
            await batch.set_many("db", [Entry("k", f"batch {i}", 60), Entry("j", "v", 60)])
            assert await backend.get("db", "k") == f"batch {i}"
            await backend.set("db", "k", f"single {i}", 60)
            assert list(await batch.get_many("db", ["k"])) == [f"single {i}"]
            await batch.delete_many("db", ["k"])
            assert await backend.get("db", "k") is None

    async def test_reader_sees_all_of_an_atomic_batch_or_nothing(self, batch: BatchBackend) -> None:
        if not batch.batches_are_atomic:
            pytest.skip("the backend does not promise it")
        keys = [f"k{i}" for i in range(50)]
        torn: list[object] = []
        is_over = False

        async def read() -> None:
            while not is_over:
                values = list(await batch.get_many("db", keys))
                if len(set(values)) != 1:
                    torn.append(values)
                await asyncio.sleep(0)

        async def write(writer: int) -> None:
            for i in range(20):
                await batch.set_many("db", [Entry(key, f"{writer} {i}", 60) for key in keys])
                if i % 5 == 4:
                    await batch.delete_many("db", keys)

        readers = [asyncio.create_task(read()) for _ in range(3)]
        await asyncio.gather(*(write(writer) for writer in range(4)))
        is_over = True
        await asyncio.gather(*readers)
        assert torn == []

    async def test_cancelled_batches_leave_the_backend_usable(self, batch: BatchBackend) -> None:
        tasks = [asyncio.create_task(batch.set_many("db", [Entry(f"k{i}", "v", 60)])) for i in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert list(await batch.get_many("db", [f"k{i}" for i in range(1, 20, 2)])) == ["v"] * 10
