"""What the logger `aiokv` says of calls, and how loudly."""

import logging

import pytest

from aiokv import AsyncKVStore, HedgePolicy
from aiokv.errors import UnavailableError
from aiokv.testing import Reply, ScriptedService, disable_backoff

VALUE = "s3cret value"


def levels(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [record.levelno for record in caplog.records if record.name == "aiokv"]


async def test_sequence_of_retries_warns_once_and_names_no_value(caplog: pytest.LogCaptureFixture) -> None:
    async with ScriptedService() as service, AsyncKVStore("db", url=service.url) as store:
        service.replies = Reply.unavailable()
        with caplog.at_level(logging.DEBUG, "aiokv"), disable_backoff():
            for _ in range(2):
                with pytest.raises(UnavailableError):
                    await store.set("key", VALUE)
    assert levels(caplog) == [logging.WARNING, logging.DEBUG, logging.DEBUG] * 2
    assert "after attempt 1 of 4: set 'key' in db 'db'" in caplog.text
    assert VALUE not in caplog.text


async def test_calls_that_succeed_at_once_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with ScriptedService() as service, AsyncKVStore("db", url=service.url) as store:
        with caplog.at_level(logging.DEBUG, "aiokv"):
            await store.set("key", VALUE)
            await store.get("key")
    assert levels(caplog) == []


async def test_hedges_and_tokens_are_told_at_debug_without_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    policy = HedgePolicy(quantile=0.5, max_extra=1.0, min_wait=0.02)
    async with (
        ScriptedService(requires_token=True) as service,
        AsyncKVStore("db", url=service.url, credentials="id:hunter2", hedge=policy) as store,
    ):
        with caplog.at_level(logging.DEBUG, "aiokv"):
            for _ in range(20):
                await store.get("warm")
            service.replies = [Reply(delay_seconds=30.0), Reply.value(VALUE)]
            assert await store.get("key") == VALUE
    assert set(levels(caplog)) == {logging.DEBUG}
    assert "sending a read a second time" in caplog.text
    assert "fetched a token for 7" in caplog.text
    assert "hunter2" not in caplog.text
    assert VALUE not in caplog.text
