"""`jsonfile:///path/to/file.json`: a store of one JSON file, for programs that keep little and people who like to look at it.

Every call locks the file and reads it whole; every write replaces it whole: right across threads and processes, and slow.
"""

import asyncio
import fcntl
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import SplitResult

from aiokv import ConfigurationError, StorageError, clock
from aiokv.backends.capabilities import MAX_BATCH_BYTES, OMITTED, Entry, Omitted
from aiokv.backends.scheme import Scheme

Namespace = dict[str, tuple[str, float]]
T = TypeVar("T")


class JsonFileBackend:
    """A `Backend` and `BatchBackend`: `{"db": {"key": ["value", seconds since the epoch until which it lives]}}`."""

    batches_are_atomic = True

    def __init__(self, path: str) -> None:
        self._path = path

    async def get(self, db_name: str, key: str) -> str | None:
        (value,) = await self.get_many(db_name, [key])
        return value if isinstance(value, str) else None

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        await self.set_many(db_name, [Entry(key, value, ttl_seconds)])

    async def delete(self, db_name: str, key: str) -> None:
        await self.delete_many(db_name, [key])

    async def aclose(self) -> None:
        """Nothing stays open between calls."""

    async def get_many(self, db_name: str, keys: Sequence[str]) -> list[str | Omitted | None]:
        namespace = await self._call(db_name, dict)
        now, room, answer = clock.now(), MAX_BATCH_BYTES, list[str | Omitted | None]()
        for key in keys:
            value, expiry = namespace.get(key, ("", 0.0))
            if now >= expiry:
                answer.append(None)
                continue
            room -= len(value.encode())
            answer.append(value if room >= 0 else OMITTED)
        return answer

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> list[None]:
        now = clock.now()
        written = {key: (value, now + ttl_seconds) for key, value, ttl_seconds in entries}
        await self._call(db_name, lambda namespace: namespace.update(written), is_write=True)
        return [None] * len(entries)

    async def delete_many(self, db_name: str, keys: Sequence[str]) -> list[None]:
        def delete(namespace: Namespace) -> None:
            for key in keys:
                namespace.pop(key, None)

        await self._call(db_name, delete, is_write=True)
        return [None] * len(keys)

    async def _call(self, db_name: str, work: Callable[[Namespace], T], *, is_write: bool = False) -> T:
        try:
            return await asyncio.to_thread(self._call_now, db_name, work, is_write=is_write)
        except (OSError, ValueError) as error:
            # The kind of the error alone: its text may hold what is in the file.
            raise StorageError(f"the JSON file cannot be used ({type(error).__name__})", maybe_applied=is_write) from None

    def _call_now(self, db_name: str, work: Callable[[Namespace], T], *, is_write: bool) -> T:
        with open(f"{self._path}.lock", "a") as lock:  # noqa: PTH123
            fcntl.flock(lock, fcntl.LOCK_EX if is_write else fcntl.LOCK_SH)
            contents = self._read()
            result = work(contents.setdefault(db_name, {}))
            if is_write:
                self._replace(contents)
            return result

    def _read(self) -> dict[str, Any]:
        if not os.path.exists(self._path):  # noqa: PTH110
            return {}
        with open(self._path, encoding="utf-8") as file:  # noqa: PTH123
            contents: dict[str, Any] = json.load(file)
            return contents

    def _replace(self, contents: dict[str, Namespace]) -> None:
        now = clock.now()
        live = {name: {key: entry for key, entry in of.items() if now < entry[1]} for name, of in contents.items()}
        with open(f"{self._path}.new", "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump({name: of for name, of in live.items() if of}, file, ensure_ascii=False, indent=1)
        os.replace(f"{self._path}.new", self._path)  # noqa: PTH105


def _path_of(url: str) -> str:
    return url[len("jsonfile:///") :]


def _check(url: str, _parts: SplitResult) -> None:
    if not url.lower().startswith("jsonfile:///") or not _path_of(url):
        raise ConfigurationError("write jsonfile:///file.json, or jsonfile:////path/file.json from the root")


SCHEME = Scheme(
    open=lambda url, _options: JsonFileBackend(_path_of(url)),
    check=_check,
    canonical=lambda url: f"jsonfile:///{os.path.realpath(_path_of(url))}",
    example="jsonfile:///file.json",
)
