"""Which store a call of a cached function uses."""

import inspect
from collections.abc import Callable
from typing import Any, cast

from aiokv.default_store import default_store
from aiokv.store import AsyncKVStore


class StoreChoice:
    """The store of a function's calls: one of its own, the default store, or what a function of the program's gives.

    Args:
        store: The option `store`.
        db_name: The option `db_name`.
        function: The cached function, whose first argument `store` may ask for.
    """

    def __init__(
        self, store: AsyncKVStore | Callable[..., AsyncKVStore] | None, db_name: str | None, function: Callable[..., object]
    ) -> None:
        self.fixed = store if isinstance(store, AsyncKVStore) else None
        self._db_name = db_name
        self._of_call: Callable[..., AsyncKVStore] | None = (
            None if store is None or self.fixed is not None else cast("Any", store)
        )
        self._needs_first = self._of_call is not None and _needs_argument(self._of_call)
        parameters = inspect.signature(function).parameters
        self.first = next(iter(parameters), "")
        self._first_default = parameters[self.first].default if parameters else None

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
            # A method's instance may be passed by name, too.
            first = (args[0] if args else kwargs.get(self.first, self._first_default),) if self._needs_first else ()
            chosen: object = self._of_call(*first)
            if not isinstance(chosen, AsyncKVStore):
                raise TypeError(f"the function that store= names must return an AsyncKVStore, not {type(chosen).__name__}")
            return chosen
        if self._db_name is None:
            return default_store()
        self.fixed = AsyncKVStore(self._db_name)
        return self.fixed


def _needs_argument(function: Callable[..., object]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        # Such as operator.attrgetter("kv"), which says nothing of what it takes.
        return True
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return any(one.kind in positional and one.default is one.empty for one in parameters)
