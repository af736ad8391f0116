"""The type of a function's results, from its annotation: how they are decoded, and a mark of their structure. Pure.

The mark covers names and order of fields, their types, defaults, aliases and constraints, whether they are required, members of
enums, and the configuration of models. Functions count by name, and so do classes with a pydantic schema of their own. The mark
is the same in every process, also where a module is run as a script. Docstrings, descriptions and methods do not count.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from aiokv.caching.naming import SCRIPTS, module_of, script_names
from aiokv.caching.packing import PACKAGES

_MARK_BYTES = 6
_MAX_DEPTH = 50
_ATOMS = (str, int, float, complex, bytes, bool, type(None), type(...))
# Settings of a field or a model that only documentation shows.
_UNSEEN = frozenset(
    {"title", "description", "examples", "json_schema_extra", "deprecated", "repr", "annotation", "doc", "kw_only"}
)
_FACTORIES: tuple[object, ...] = (list, dict, set, tuple, frozenset)
_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)


class Schema(NamedTuple):
    """The structure of the annotated type, as far as it matters for JSON.

    Args:
        mark: A digest, which differs for another structure; `""` for `Any`.
        has_models: Whether pydantic models may occur, which remember the fields that were set.
        has_aliases: Whether a field has another name in JSON.
        may_omit_unset: Whether each default of a model is plain data and thereby part of the mark.
        orders: The fields of each `TypedDict`, in order.
    """

    mark: str
    has_models: bool = False
    has_aliases: bool = False
    may_omit_unset: bool = True
    orders: tuple[dict[str, None], ...] = ()


def is_json_native_type(returns: Any) -> bool:
    """Return whether the values of a type are JSON already, as far as the type shows.

    Args:
        returns: The annotated type.

    Returns:
        True for `Any`, `object` and types made of str, int, float, bool, None, list, and dict with str keys.
    """
    # By identity, since the metadata of an annotation may not be hashable.
    if any(returns is native for native in (Any, None, type(None), str, int, float, bool, dict, list, object)):
        return True
    origin, arguments = typing.get_origin(returns), typing.get_args(returns)
    if origin is list:
        return all(map(is_json_native_type, arguments))
    if origin is dict:
        return not arguments or (arguments[0] is str and is_json_native_type(arguments[1]))
    if origin in {typing.Union, types.UnionType}:
        return all(map(is_json_native_type, arguments))
    if origin is Literal:
        return all(type(argument) in {str, int, bool, type(None)} for argument in arguments)
    return False


def type_adapter(returns: Any, name: str) -> Any:
    """Make the adapter that writes and reads the results of a type.

    Args:
        returns: The annotated type.
        name: The function, for messages.

    Returns:
        A complete `pydantic.TypeAdapter`.

    Raises:
        TypeError: pydantic is not installed, or knows no way to decode the type.
        NameError: A field of the type uses a name that is not defined yet.
    """
    try:
        from pydantic import ConfigDict, PydanticUserError, TypeAdapter  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise TypeError(
            f"{name}: to decode results to {type_name(returns)}, install pydantic: pip install 'aiokv[pydantic]'; "
            "or return str, int, float, bool, None, list and dict with str keys"
        ) from error
    config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="strings")
    try:
        try:
            adapter = TypeAdapter(returns, config=config)
        except PydanticUserError as error:
            if error.code != "type-adapter-config-unused":
                raise
            # A model, dataclass or TypedDict brings a configuration of its own.
            adapter = TypeAdapter(returns)
        if not adapter.pydantic_complete:
            # This raises NameError where a field uses a name that is not defined yet.
            adapter.rebuild(raise_errors=True)
    except PydanticUserError as error:
        if error.code == "class-not-fully-defined":
            raise NameError(f"a field of {type_name(returns)} names what is not defined") from None
        hint = "take TypedDict from typing_extensions" if error.code == "typed-dict-version" else "pass returns="
        if error.code == "schema-for-unknown-type" and any(f"<class '{name}." in str(error) for name in PACKAGES):
            hint = "annotate arrays and tables in its fields as Annotated[..., aiokv.Packed]"
        raise TypeError(f"{name}: results of type {type_name(returns)} cannot be decoded; {hint}") from error
    return adapter


def describe(returns: Any) -> Schema:
    """Describe the structure of a type.

    Args:
        returns: The annotated type; its models must be complete.

    Returns:
        The same description in every process that runs this code.
    """
    if returns is Any:
        return Schema("")
    describer = _Describer()
    text = describer.type(returns)
    mark = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_MARK_BYTES).hexdigest()
    return Schema(mark, describer.has_models, describer.has_aliases, describer.has_plain_defaults, tuple(describer.orders))


def type_name(returns: Any) -> str:
    """Return a type's name, for messages.

    Args:
        returns: Any annotation.

    Returns:
        Its name, or its text where it has none.
    """
    return str(getattr(returns, "__name__", returns))


class _Describer:
    """A writer of types as text. A class that occurs again is written as a number, so that recursion ends."""

    def __init__(self) -> None:
        self.has_models = False
        self.has_aliases = False
        self.has_plain_defaults = True
        self.orders: list[dict[str, None]] = []
        # Together with the objects, since an id is valid only as long as its object lives.
        self._seen: dict[int, tuple[int, object]] = {}
        self._depth = 0

    def type(self, returns: Any) -> str:  # noqa: C901, PLR0911 (one branch for each kind of annotation)
        """Describe an annotation."""
        if returns is None or returns is type(None):
            return "None"
        if isinstance(returns, str | typing.ForwardRef):
            return repr(getattr(returns, "__forward_arg__", returns))
        origin, arguments = typing.get_origin(returns), typing.get_args(returns)
        if origin is typing.Annotated:
            metadata = ",".join(map(self.value, returns.__metadata__))
            return f"Annotated[{self.type(arguments[0])};{metadata}]"
        if origin is Literal:
            return f"Literal[{','.join(map(self.value, arguments))}]"
        if origin in {typing.Union, types.UnionType}:
            return f"Union[{','.join(map(self.type, arguments))}]"
        # Generic is its own origin.
        if origin is not None and origin is not returns:
            return f"{self.type(origin)}[{','.join(map(self._argument, arguments))}]"
        if isinstance(returns, type):
            return self._known(returns, self._class)
        if hasattr(returns, "__supertype__"):
            return f"NewType {returns.__name__}:{self.type(returns.__supertype__)}"
        if hasattr(returns, "__value__"):
            return self._known(returns, lambda alias: f"type {alias.__name__}={self.type(alias.__value__)}")
        if isinstance(returns, typing.TypeVar):
            limits = [returns.__bound__, *returns.__constraints__, getattr(returns, "__default__", None)]
            return f"~{returns.__name__}:{','.join(map(self.type, limits))}"
        return _without_addresses(str(returns))

    def value(self, value: Any) -> str:
        """Describe a default, a constraint or a setting."""
        text, _ = self._value(value)
        return text

    def _argument(self, argument: Any) -> str:
        if isinstance(argument, list | tuple):
            return f"[{','.join(map(self._argument, argument))}]"
        return "..." if argument is ... else self.type(argument)

    def _known(self, kind: Any, describe_new: Callable[[Any], str]) -> str:
        if id(kind) in self._seen:
            return f"#{self._seen[id(kind)][0]}"
        self._seen[id(kind)] = (len(self._seen), kind)
        return describe_new(kind)

    def _class(self, kind: Any) -> str:
        name = _name_of(kind)
        if kind.__module__ == "builtins":
            return name
        if issubclass(kind, enum.Enum):
            members = [f"{member}={self.value(item.value)}" for member, item in kind.__members__.items()]
            return f"{name}({','.join(members)})"
        parts = [self._config(kind)]
        generic = getattr(kind, "__pydantic_generic_metadata__", None)
        if generic:
            parts.append(",".join(map(self._argument, generic["args"])))
        if "__pydantic_fields__" in vars(kind):
            is_model = hasattr(kind, "__pydantic_fields_set__")
            self.has_models |= is_model
            parts += [f"{field}:{self._field(info, is_model)}" for field, info in kind.__pydantic_fields__.items()]
        elif dataclasses.is_dataclass(kind):
            hints = _hints(kind)
            for field in dataclasses.fields(kind):
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory
                described = "required" if default is dataclasses.MISSING else self.value(default)
                parts.append(f"{field.name}:{self.type(hints.get(field.name, field.type))}={described};{field.init}")
        elif hasattr(kind, "__total__") and hasattr(kind, "__required_keys__"):
            hints = _hints(kind)
            self.orders.append(dict.fromkeys(hints))
            parts += [f"{field}:{self.type(hint)};{field in kind.__required_keys__}" for field, hint in hints.items()]
        elif hasattr(kind, "_field_defaults"):
            hints = _hints(kind)
            for field in kind._fields:
                described = self.value(kind._field_defaults[field]) if field in kind._field_defaults else "required"
                parts.append(f"{field}:{self.type(hints.get(field, Any))}={described}")
        parts += map(self.type, getattr(kind, "__orig_bases__", ()) if not generic else ())
        return f"{name}({','.join(parts)})"

    def _config(self, kind: Any) -> str:
        config: Any = getattr(kind, "model_config", None) or getattr(kind, "__pydantic_config__", None) or {}
        if not isinstance(config, Mapping):
            return ""
        self.has_aliases |= config.get("alias_generator") is not None
        return ",".join(f"{name}={self.value(config[name])}" for name in sorted(config) if name not in _UNSEEN)

    def _field(self, info: Any, of_model: bool) -> str:  # noqa: FBT001 (one private call)
        """Describe a `pydantic.fields.FieldInfo`."""
        factory = info.default_factory
        default, is_plain = self._value(info.default if factory is None else factory)
        if of_model and not (is_plain if factory is None else any(factory is known for known in _FACTORIES)):
            self.has_plain_defaults = False
        names = ("alias", "validation_alias", "serialization_alias")
        self.has_aliases |= any(getattr(info, name, None) is not None for name in names)
        settings = [
            (name, getattr(info, name, None)) for name in (*names, "exclude", "discriminator", "init", "validate_default")
        ]
        described = ",".join(f"{name}={self.value(setting)}" for name, setting in settings if setting is not None)
        metadata = ",".join(map(self.value, info.metadata))
        return f"{self.type(info.annotation)}={default};{described};{metadata}"

    def _value(self, value: Any) -> tuple[str, bool]:  # noqa: C901, PLR0911, PLR0912 (one branch for each kind of value)
        """Return the text of a value, and whether it holds all of the value."""
        kind = type(value)
        items: Any = value
        if kind in _ATOMS:
            return repr(value), True
        if kind.__name__ == "PydanticUndefinedType":
            return "required", True
        if isinstance(value, enum.Enum):
            return f"{_name_of(kind)}.{value.name}", True
        if isinstance(value, _FUNCTIONS) or (isinstance(value, type) and typing.get_origin(value) is None):
            return _name_of(value), True
        if self._depth >= _MAX_DEPTH:
            return "...", False
        self._depth += 1
        try:
            if kind in {list, tuple}:
                return self._values(_name_of(kind), items)
            if kind in {set, frozenset}:
                pairs = sorted(self._value(item) for item in items)
                return f"{_name_of(kind)}({','.join(text for text, _ in pairs)})", all(plain for _, plain in pairs)
            if kind is dict:
                return self._values("dict", [part for pair in items.items() for part in pair])
            if kind is functools.partial:
                return self._values("partial", [value.func, *value.args, value.keywords])[0], False
            if kind.__name__ == "FieldInfo":
                return self._field(value, of_model=False), True
            if kind.__module__.partition(".")[0] in sys.stdlib_module_names:
                return _without_addresses(repr(value)), True
            state = {name: item for name, item in getattr(value, "__dict__", {}).items() if name not in _UNSEEN}
            if dataclasses.is_dataclass(value):
                state |= {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
            return self._values(_name_of(kind), [part for pair in state.items() for part in pair])[0], False
        finally:
            self._depth -= 1

    def _values(self, name: str, values: Any) -> tuple[str, bool]:
        pairs = list(map(self._value, values))
        return f"{name}({','.join(text for text, _ in pairs)})", all(plain for _, plain in pairs)


def _hints(kind: Any) -> dict[str, Any]:
    """Resolve the annotations of a class; one by one where a name is not defined."""
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except Exception:  # noqa: BLE001 (evaluating an annotation runs the program's code)
        hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        for name, hint in inspect.get_annotations(base).items():
            stub = type("stub", (), {"__annotations__": {name: hint}, "__module__": base.__module__})
            try:
                hints |= typing.get_type_hints(stub, include_extras=True)
            except Exception:  # noqa: BLE001 (likewise)
                hints[name] = hint
    return hints


def _name_of(value: Any) -> str:
    module = getattr(value, "__module__", None) or ""
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    if module.partition(".")[0] in sys.stdlib_module_names:
        # Such as pathlib._local of Python 3.13.
        module = module.partition("._")[0]
    return name if module == "builtins" else f"{module_of(value) if module in SCRIPTS else module}.{name}"


def _without_addresses(text: str) -> str:
    # Metadata may hold objects such as functions, whose addresses differ between processes.
    text = re.sub(r" at 0x[0-9A-Fa-f]+", "", text)
    for script, name in script_names().items():
        text = text.replace(f"{script}.", f"{name}.")
    return text
