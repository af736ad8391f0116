"""What every backend promises: get, set, delete."""

import asyncio
from typing import Final

import pytest

from aiokv.backends.base import Backend
from aiokv.limits import MAX_TTL_SECONDS, MAX_VALUE_BYTES
from aiokv.testing.contract.suite import ODD_KEYS, ContractSuite, Passing

ODD_DB_NAMES: Final = ["a b", "a%2Fb", "?", "#", "...", "é", "😀", "a'b", "*", "{a}", ":", "a:b"]
ODD_VALUES: Final = ["", "\0", "a\0b", "😀" * 100, "\ufeff", "\n", '{"value": "x"}', "a=b&c=%20", "null", "\u2028", "\x7f\x80"]


class BackendContract(ContractSuite):
    """The promises of `aiokv.Backend`."""

    async def test_absent_key_is_none(self, backend: Backend) -> None:
        assert await backend.get("db", "absent") is None

    async def test_last_write_wins(self, backend: Backend) -> None:
        await backend.set("db", "k", "first", 60)
        await backend.set("db", "k", "second", 60)
        assert await backend.get("db", "k") == "second"

    async def test_delete_succeeds_twice_and_leaves_nothing(self, backend: Backend) -> None:
        await backend.set("db", "k", "v", 60)
        await backend.delete("db", "k")
        await backend.delete("db", "k")
        assert await backend.get("db", "k") is None

    async def test_entry_is_there_until_its_expiry_and_not_at_it(self, backend: Backend, passing: Passing) -> None:
        await backend.set("db", "k", "v", passing.life_seconds)
        await passing.wait(0.5)
        assert await backend.get("db", "k") == "v"
        await passing.wait(0.5)
        assert await backend.get("db", "k") is None

    async def test_setting_anew_renews_the_time_to_live(self, backend: Backend, passing: Passing) -> None:
        await backend.set("db", "k", "v", passing.life_seconds)
        await passing.wait(0.5)
        await backend.set("db", "k", "w", passing.life_seconds * 2)
        await passing.wait(0.75)
        assert await backend.get("db", "k") == "w"

    async def test_setting_anew_may_shorten_the_time_to_live(self, backend: Backend, passing: Passing) -> None:
        await backend.set("db", "k", "v", MAX_TTL_SECONDS)
        await backend.set("db", "k", "w", passing.life_seconds)
        await passing.wait(1)
        assert await backend.get("db", "k") is None

    async def test_expired_key_can_be_set_anew(self, backend: Backend, passing: Passing) -> None:
        await backend.set("db", "k", "v", passing.life_seconds)
        await passing.wait(1)
        await backend.set("db", "k", "w", 60)
        assert await backend.get("db", "k") == "w"

    async def test_namespaces_do_not_see_each_other(self, backend: Backend) -> None:
        await backend.set("one", "k", "1", 60)
        await backend.set("two", "k", "2", 60)
        await backend.delete("one", "k")
        assert (await backend.get("one", "k"), await backend.get("two", "k")) == (None, "2")

    async def test_namespace_and_key_are_not_run_together(self, backend: Backend) -> None:
        names = [("a", "b:c"), ("a:b", "c"), ("a", "b c"), ("a b", "c"), ("ab", "c"), ("a", "bc")]
        for db_name, key in names:
            await backend.set(db_name, key, f"{db_name} and {key}", 60)
        assert [await backend.get(*name) for name in names] == [f"{db_name} and {key}" for db_name, key in names]

    @pytest.mark.parametrize("key", ODD_KEYS, ids=ascii)
    async def test_every_key_names_its_own_entry(self, backend: Backend, key: str) -> None:
        await backend.set("db", key, f"value of {key}", 60)
        others = [other for other in ODD_KEYS if other != key]
        assert await backend.get("db", key) == f"value of {key}"
        assert [other for other in others[:8] if await backend.get("db", other) is not None] == []

    @pytest.mark.parametrize("db_name", ODD_DB_NAMES, ids=ascii)
    async def test_every_namespace_names_its_own_entries(self, backend: Backend, db_name: str) -> None:
        await backend.set(db_name, "k", "v", 60)
        assert (await backend.get(db_name, "k"), await backend.get("db", "k")) == ("v", None)

    @pytest.mark.parametrize("value", ODD_VALUES, ids=ascii)
    async def test_every_value_comes_back_as_it_was(self, backend: Backend, value: str) -> None:
        await backend.set("db", "k", value, 60)
        assert await backend.get("db", "k") == value

    @pytest.mark.parametrize("char", ["x", "é", "€", "😀", '"', "\0"], ids=ascii)
    async def test_value_of_the_largest_size_comes_back_whole(self, backend: Backend, char: str) -> None:
        value = char * (MAX_VALUE_BYTES // len(char.encode()))
        await backend.set("db", "k", value, 60)
        # Compared outside the assertion: pytest would print two megabytes.
        same = await backend.get("db", "k") == value
        assert same

    async def test_concurrent_writes_and_reads_of_many_keys_all_land(self, backend: Backend) -> None:
        await asyncio.gather(*(backend.set("db", f"k{i}", f"v{i}", 60) for i in range(300)))
        values = await asyncio.gather(*(backend.get("db", f"k{i}") for i in range(300)))
        assert values == [f"v{i}" for i in range(300)]

    async def test_concurrent_writes_of_one_key_leave_one_of_them(self, backend: Backend) -> None:
        await asyncio.gather(*(backend.set("db", "k", f"v{i}", 60) for i in range(50)))
        assert await backend.get("db", "k") in {f"v{i}" for i in range(50)}

    async def test_write_is_seen_by_the_next_read(self, backend: Backend) -> None:
        for i in range(50):
            await backend.set("db", "k", str(i), 60)
            assert await backend.get("db", "k") == str(i)

    async def test_cancelled_writes_leave_the_backend_usable(self, backend: Backend) -> None:
        tasks = [asyncio.create_task(backend.set("db", f"k{i}", "v", 60)) for i in range(50)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None for result in results[1::2])
        assert [await backend.get("db", f"k{i}") for i in range(1, 50, 2)] == ["v"] * 25

    async def test_closing_twice_is_harmless(self, backend: Backend) -> None:
        await backend.aclose()
        await backend.aclose()
