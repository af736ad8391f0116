"""Which store a call of a cached function uses."""

import inspect
from collections.abc import Callable
from typing import Any

from aiokv.caching.arguments import compile_choice
from aiokv.default_store import default_store
from aiokv.store import AsyncKVStore
from aiokv.sync import KVStore


class StoreChoice:
    """The store of a function's calls: one of its own, the default store, or what a function of the program's gives.

    Args:
        store: The option `store`.
        db_name: The option `db_name`.
        function: The cached function, whose arguments `store` may ask for.

    Raises:
        TypeError: `store` is a function that asks for something else.
    """

    def __init__(
        self,
        store: AsyncKVStore | KVStore | Callable[..., AsyncKVStore | KVStore] | None,
        db_name: str | None,
        function: Callable[..., object],
    ) -> None:
        self.fixed = store if isinstance(store, AsyncKVStore) else None
        self._db_name = db_name
        signature = inspect.signature(function)
        self._of_call: Callable[..., AsyncKVStore | KVStore] | None = None
        if store is not None and not isinstance(store, AsyncKVStore | KVStore):
            self._of_call = compile_choice("store", store, function, signature)
        self.first = next(iter(signature.parameters), "")

    @property
    def is_default(self) -> bool:
        """Whether calls use the default store."""
        return self.fixed is None and self._of_call is None and self._db_name is None

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsyncKVStore:
        """Return the store of a call.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.
        """
        if self.fixed is not None:
            return self.fixed
        if self._of_call is not None:
            chosen: object = self._of_call(*args, **kwargs)
            if isinstance(chosen, KVStore):
                return chosen.async_store
            if not isinstance(chosen, AsyncKVStore):
                raise TypeError(
                    f"the function that store= names must return an AsyncKVStore or a KVStore, not {type(chosen).__name__}"
                )
            return chosen
        if self._db_name is None:
            return default_store()
        self.fixed = AsyncKVStore(self._db_name)
        return self.fixed
