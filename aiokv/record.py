"""`Record`: a class of named values, at a small part of what importing a dataclass costs.

`dataclasses` writes source code for each class and compiles it: two to four million instructions at every import, where ten
such classes are a tenth of what `import aiokv` costs. A record is read, compared, shown and pickled as a frozen dataclass is,
and type checkers take it for one.
"""

import inspect
from typing import Any, ClassVar, NoReturn, Self, dataclass_transform


class _SignatureOf:
    """The signature of a class of records, made when `help` or `inspect.signature` asks for it."""

    def __get__(self, _: object, owner: type["Record"]) -> inspect.Signature:
        return owner._make_signature()  # noqa: SLF001 (this module's own)


@dataclass_transform(frozen_default=True)
class Record:
    """Named values that never change: a subclass annotates them in its body, and its `__post_init__` checks them.

    Args:
        values: The first values by position, unless the class is made with `kw_only=True`.
        named: Others by name.

    Raises:
        TypeError: One is missing, unknown or given twice.
    """

    __match_args__: ClassVar[tuple[str, ...]] = ()
    __signature__ = _SignatureOf()
    _defaults: ClassVar[dict[str, Any]] = {}
    _keywords_only: ClassVar[bool] = False

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        super().__init_subclass__()
        cls.__match_args__ = tuple(inspect.get_annotations(cls))  # type: ignore[misc]  # not of a dataclass, as mypy thinks
        cls._defaults = {name: vars(cls)[name] for name in cls.__match_args__ if name in vars(cls)}
        cls._keywords_only = kw_only

    def __init__(self, *values: Any, **named: Any) -> None:
        names = self.__match_args__
        if values:
            if self._keywords_only or len(values) > len(names):
                raise TypeError(f"{type(self).__name__} takes {'keywords alone' if self._keywords_only else len(names)} values")
            given = dict(zip(names, values, strict=False))
            if not given.keys().isdisjoint(named):
                raise TypeError(f"{type(self).__name__} got {next(iter(given.keys() & named))!r} twice")
            named = given | named
        state = self._defaults | named
        if len(state) != len(names) or not named.keys() <= set(names):
            wrong = [name for name in names if name not in state]
            unknown = [name for name in named if name not in names]
            raise TypeError(
                f"{type(self).__name__} "
                + (f"has no {unknown[0]!r}; it has {', '.join(names)}" if unknown else f"needs {', '.join(wrong)}")
            )
        # In the order of the annotations, which is that of hash and repr.
        self.__dict__.update({name: state[name] for name in names})
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check the values; a subclass may override it."""

    @classmethod
    def _make_signature(cls) -> inspect.Signature:
        parameter, empty = inspect.Parameter, inspect.Parameter.empty
        kind = parameter.KEYWORD_ONLY if cls._keywords_only else parameter.POSITIONAL_OR_KEYWORD
        types = inspect.get_annotations(cls)
        return inspect.Signature(
            [
                parameter(name, kind, default=cls._defaults.get(name, empty), annotation=types[name])
                for name in cls.__match_args__
            ]
        )

    def _replace(self, **changes: Any) -> Self:
        """Return a record with some values changed, checked anew."""
        return type(self)(**{**self.__dict__, **changes})

    # What `copy.replace` of Python 3.13 calls.
    __replace__ = _replace

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    def __setattr__(self, name: str, _: object) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} cannot be changed ({name}); make another one")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} cannot be changed ({name}); make another one")
