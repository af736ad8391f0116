"""What a backend promises whose claims exclude one another."""

import asyncio

import pytest

from aiokv.backends.base import Backend
from aiokv.backends.capabilities import MAX_CLAIM_SECONDS, MIN_CLAIM_SECONDS, ClaimBackend, capabilities_of
from aiokv.testing.contract.suite import ODD_KEYS, ContractSuite, Passing


class ClaimContract(ContractSuite):
    """The promises of `ClaimBackend`."""

    @pytest.fixture
    def claims(self, backend: Backend) -> ClaimBackend:
        """The backend's capability."""
        found = capabilities_of(backend).claim
        assert found is not None, "the backend has no ClaimBackend"
        return found

    async def test_claim_that_nobody_holds_is_taken_for_the_seconds_asked(self, claims: ClaimBackend) -> None:
        outcome = await claims.claim("db", "k", "me", 30)
        assert outcome.is_held
        assert 29 < outcome.seconds_left <= 30

    async def test_claim_of_another_is_refused_with_what_it_has_left(self, claims: ClaimBackend) -> None:
        await claims.claim("db", "k", "me", 30)
        outcome = await claims.claim("db", "k", "you", 60)
        assert not outcome.is_held
        assert 20 < outcome.seconds_left <= 30

    @pytest.mark.parametrize("seconds", [MIN_CLAIM_SECONDS, 1.5, MAX_CLAIM_SECONDS])
    async def test_claim_lasts_any_seconds_of_the_range(self, claims: ClaimBackend, seconds: float) -> None:
        outcome = await claims.claim("db", "k", "me", seconds)
        assert outcome.is_held
        assert seconds - 0.9 < outcome.seconds_left <= seconds

    async def test_claim_ends_by_itself(self, claims: ClaimBackend, passing: Passing) -> None:
        await claims.claim("db", "k", "me", passing.life_seconds)
        await passing.wait(0.5)
        assert not (await claims.claim("db", "k", "you", 30)).is_held
        await passing.wait(0.5)
        assert (await claims.claim("db", "k", "you", 30)).is_held

    async def test_owner_renews_its_claim(self, claims: ClaimBackend, passing: Passing) -> None:
        await claims.claim("db", "k", "me", passing.life_seconds)
        await passing.wait(0.5)
        assert (await claims.claim("db", "k", "me", passing.life_seconds * 2)).is_held
        await passing.wait(0.75)
        assert not (await claims.claim("db", "k", "you", 30)).is_held

    async def test_owner_may_shorten_its_claim(self, claims: ClaimBackend, passing: Passing) -> None:
        await claims.claim("db", "k", "me", MAX_CLAIM_SECONDS)
        await claims.claim("db", "k", "me", passing.life_seconds)
        await passing.wait(1)
        assert (await claims.claim("db", "k", "you", 30)).is_held

    async def test_owner_renews_what_it_holds_and_nothing_else(self, claims: ClaimBackend, passing: Passing) -> None:
        await claims.claim("db", "k", "me", passing.life_seconds)
        await passing.wait(0.5)
        outcome = await claims.renew("db", "k", "me", passing.life_seconds * 2)
        assert (outcome.is_held, outcome.is_new) == (True, False)
        assert passing.life_seconds < outcome.seconds_left <= passing.life_seconds * 2
        await passing.wait(0.75)
        assert not (await claims.claim("db", "k", "you", 30)).is_held

    async def test_renewal_behind_the_release_takes_nothing(self, claims: ClaimBackend) -> None:
        await claims.claim("db", "k", "me", 30)
        await claims.release("db", "k", "me")
        assert await claims.renew("db", "k", "me", 30) == (False, 0.0, False)
        assert (await claims.claim("db", "k", "you", 30)).is_held

    async def test_renewal_behind_the_end_takes_nothing(self, claims: ClaimBackend, passing: Passing) -> None:
        await claims.claim("db", "k", "me", passing.life_seconds)
        await passing.wait(1)
        assert await claims.renew("db", "k", "me", 30) == (False, 0.0, False)
        assert (await claims.claim("db", "k", "you", 30)).is_held

    async def test_renewal_of_what_nobody_has_claimed_takes_nothing(self, claims: ClaimBackend) -> None:
        assert await claims.renew("db", "k", "me", 30) == (False, 0.0, False)
        assert (await claims.claim("db", "k", "you", 30)).is_held

    async def test_renewal_by_another_leaves_the_claim_as_it_is(self, claims: ClaimBackend) -> None:
        await claims.claim("db", "k", "me", 30)
        outcome = await claims.renew("db", "k", "you", 3600)
        assert not outcome.is_held
        assert 20 < outcome.seconds_left <= 30
        assert (await claims.claim("db", "k", "third", 30)).seconds_left <= 30
        assert await claims.release("db", "k", "me")

    async def test_owner_may_shorten_its_claim_by_a_renewal(self, claims: ClaimBackend, passing: Passing) -> None:
        await claims.claim("db", "k", "me", MAX_CLAIM_SECONDS)
        assert (await claims.renew("db", "k", "me", passing.life_seconds)).is_held
        await passing.wait(1)
        assert (await claims.claim("db", "k", "you", 30)).is_held

    async def test_released_claim_is_free_at_once(self, claims: ClaimBackend) -> None:
        await claims.claim("db", "k", "me", 30)
        assert await claims.release("db", "k", "me")
        assert not await claims.release("db", "k", "me")
        assert (await claims.claim("db", "k", "you", 30)).is_held

    async def test_claim_is_not_released_by_another(self, claims: ClaimBackend) -> None:
        await claims.claim("db", "k", "me", 30)
        assert not await claims.release("db", "k", "you")
        assert not (await claims.claim("db", "k", "you", 30)).is_held

    async def test_release_of_what_nobody_claimed_is_false(self, claims: ClaimBackend) -> None:
        assert not await claims.release("db", "absent", "me")

    async def test_release_by_a_former_owner_leaves_the_present_one(self, claims: ClaimBackend, passing: Passing) -> None:
        await claims.claim("db", "k", "me", passing.life_seconds)
        await passing.wait(1)
        await claims.claim("db", "k", "you", 30)
        assert not await claims.release("db", "k", "me")
        assert not (await claims.claim("db", "k", "third", 30)).is_held

    async def test_release_after_the_end_is_false(self, claims: ClaimBackend, passing: Passing) -> None:
        await claims.claim("db", "k", "me", passing.life_seconds)
        await passing.wait(1)
        assert not await claims.release("db", "k", "me")

    async def test_one_of_fifty_tasks_gets_the_claim(self, claims: ClaimBackend) -> None:
        outcomes = await asyncio.gather(*(claims.claim("db", "k", f"owner-{i}", 30) for i in range(50)))
        assert [outcome.is_held for outcome in outcomes].count(True) == 1
        assert all(outcome.seconds_left > 0 for outcome in outcomes)

    async def test_fifty_tasks_hold_the_claim_one_after_the_other(self, claims: ClaimBackend) -> None:
        holders: list[str] = []
        most = 0

        async def work(owner: str) -> None:
            nonlocal most
            while not (await claims.claim("db", "k", owner, 30)).is_held:  # noqa: ASYNC110 (a claim has no event to wait for)
                await asyncio.sleep(0.005)
            holders.append(owner)
            most = max(most, len(holders))
            await asyncio.sleep(0)
            holders.remove(owner)
            assert await claims.release("db", "k", owner)

        await asyncio.gather(*(work(f"owner-{i}") for i in range(50)))
        assert most == 1

    async def test_claims_and_values_are_apart(self, backend: Backend, claims: ClaimBackend) -> None:
        await claims.claim("db", "k", "me", 30)
        assert await backend.get("db", "k") is None
        await backend.set("db", "k", "v", 60)
        assert await backend.get("db", "k") == "v"
        await backend.delete("db", "k")
        assert not (await claims.claim("db", "k", "you", 30)).is_held
        await backend.set("db", "k", "w", 60)
        await claims.release("db", "k", "me")
        assert await backend.get("db", "k") == "w"

    async def test_claims_do_not_show_in_listings(self, backend: Backend, claims: ClaimBackend) -> None:
        scan = capabilities_of(backend).scan
        if scan is None:
            pytest.skip("the backend has no ScanBackend")
        await claims.claim("db", "claimed", "me", 30)
        await backend.set("db", "k", "v", 60)
        assert [info.key for info in (await scan.scan("db")).infos] == ["k"]
        assert await scan.count("db") == 1
        assert (await scan.clear("db")).deleted == 1
        assert not (await claims.claim("db", "claimed", "you", 30)).is_held

    async def test_odd_keys_and_other_namespaces_have_claims_of_their_own(self, claims: ClaimBackend) -> None:
        for i, key in enumerate(ODD_KEYS):
            assert (await claims.claim("db", key, f"owner-{i}", 30)).is_held
        assert (await claims.claim("other", "k", "you", 30)).is_held
        assert [await claims.release("db", key, f"owner-{i}") for i, key in enumerate(ODD_KEYS)] == [True] * len(ODD_KEYS)
