"""From a result to JSON and back: a result that would come back changed is not stored. Pure.

Arrays and tables are JSON, too: one text of binary content, see `packing`. Alone they need no pydantic.

`TypeError` means that results of this type cannot be stored, `NotStorable` that this one result cannot:

- `TypeError`: a set, a tuple or an object where there is no annotation, or one of native JSON types; another type than
  annotated, at any depth, subclasses included; an annotation that does not accept its own JSON; an annotation that masks, such
  as `SecretStr`.
- `NotStorable`: NaN or infinity where the annotated type has no text for them (native JSON types, most models); an int of more
  than 64 bits as a native type; a lone surrogate; bytes that are not UTF-8 in a model; a value that is nested too deeply or
  holds itself; state that JSON loses, such as excluded fields, private and extra attributes; a value that a validator changes;
  a value of one annotated type that comes back as another, such as "2020-01-01" under `date | str`; where a method returns
  `Self`, an instance of a subclass.

The JSON of a model holds its fields by name. `model_fields_set` comes back, too. Where the mark of the schema covers their
defaults, unset fields are left out. Else the stored text is ` [[sets, indices],`, a line break, the JSON and `]`: JSON as well.
"""

import contextlib
import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple, cast

import orjson

from aiokv.caching.ambiguity import holds_packed, is_ambiguous
from aiokv.caching.annotation import return_annotation
from aiokv.caching.jsonable import Difference, find_not_native, find_unholdable, is_native, models_in
from aiokv.caching.packed import Form, dump_checked, fault_of, find_form, with_packed
from aiokv.caching.packing import PACKAGES, bounded
from aiokv.caching.roundtrip import difference
from aiokv.caching.schema import Schema, describe, is_json_native_type, type_adapter
from aiokv.caching.unpackable import Unpackable

_NEEDED = {"numpy": "", "pandas": " (needs 'aiokv[pandas]')", "pyarrow": " (needs 'aiokv[pandas]')"}
_NATIVE = "str, int, float, bool, None, list and dict with str keys"
_TOO_DEEP: Final = Difference("", "is nested too deeply for JSON, or holds itself", is_type=False)
_TOO_LARGE: Final = Difference("", "takes more memory than there is", is_type=False)
_WRONG_TYPE: Final = Difference("", "is of another type than annotated, in whole or in part", is_type=True)
_OTHER_MODELS: Final = Difference("", "comes back with other models", is_type=True)
# How pydantic's messages begin. They also quote the value, so they are never shown.
_WARNED = "Pydantic serializer warnings"
_DEEP = ("Error serializing to JSON: ValueError: Circular reference", "Error serializing to JSON: ValueError: Maximum")
_UNREADABLE = frozenset({"json_invalid", "recursion_loop"})
# No JSON writer begins with a space. The first item of bytes is a number.
_SPACES = frozenset({" ", ord(" ")})
_ALIKE = "whose JSON looks the same"
_SUBCLASS = "is of a subclass"
_OVERSIZE = "before compression"
# Of these JSON keeps the type, whatever is annotated.
_NATIVE_TYPES = frozenset({str, int, float, bool, list, dict, type(None)})
_ADVICE = (
    ("NaN", "return None or a str in its place"),
    ("64 bits", "return it as a str"),
    ("surrogate", "replace it, as str.encode(errors='replace') does"),
    ("UTF-8", "set ser_json_bytes and val_json_bytes of its model_config to 'base64'"),
    (_OVERSIZE, "return less of it, or split the work into several calls"),
    ("deeply", "return something flatter"),
    (_ALIKE, "annotate types that differ in their JSON, such as models with a tag"),
    (_SUBCLASS, "give the subclass a cached method of its own"),
)


class NotStorable(Exception):  # noqa: N818 (no fault of the program: the caller gets the result)
    """One result that cannot be stored; the text says why and what helps, without the value."""


class TooLarge(NotStorable):
    """One result that is larger than any store takes."""


class _Mode(NamedTuple):
    """A way to write a result: options of pydantic's serializer, and whether the set fields are stored beside the JSON."""

    options: dict[str, Any]
    keeps_sets: bool


class ResultCodec:
    """The writer and reader of one function's results as JSON.

    Args:
        function: The function, for its name and its return annotation.
        returns: The type to decode to, where the annotation does not say it; None takes the annotation.
        part: Returns the type of a stored result for the annotation, where a part of what is returned is stored.

    Raises:
        TypeError: JSON cannot be decoded to the annotated type.
    """

    def __init__(
        self, function: Callable[..., object], returns: Any = None, part: Callable[[Any], Any] = lambda returns: returns
    ) -> None:
        self._function = function
        self._name = function.__qualname__
        self._returns = returns
        self._part = part
        self._is_annotated = False
        self._orders: tuple[dict[str, None], ...] = ()
        self.schema = ""
        """The mark of the annotated type's structure, once resolved; empty where nothing is annotated."""
        # Of arrays and tables, which are stored as binary content.
        self._form: Form | None = None
        self._holds_packed = False
        # None: the result is its own JSON.
        self._to_json: Callable[..., bytes] | None = None
        self._to_python: Callable[..., object] = lambda result, **_: result
        self._validate: Callable[[bytes | str], Any] = orjson.loads
        self._validate_strictly: Callable[[object], object] = lambda result: result
        # Tried in order, the last that succeeded first.
        self._modes: tuple[_Mode, ...] = ()
        self._plain_mode = _Mode({}, keeps_sets=False)
        self._resolved = False
        self.load: Callable[[bytes | str], Any] = self._resolve_and_load
        """Make a fresh object from JSON that `dump` made.

        `ValueError`: the JSON is not of this function's results. What a validator of the type's own raises passes through.
        """
        # The annotation may use a name that its module defines later. Then the first call resolves it.
        with contextlib.suppress(NameError, AttributeError):
            self._resolve()

    def resolve(self) -> None:
        """Resolve the type of the results, unless that is done.

        Raises:
            TypeError: Its return annotation cannot be resolved or decoded to; the message says what to do.
        """
        if self._resolved:
            return
        try:
            self._resolve()
        except (NameError, AttributeError) as error:
            raise TypeError(
                f"{self._name}: the return annotation cannot be resolved ({error}); import what it names, or pass returns="
            ) from None

    def dump(self, result: object) -> bytes:
        """Make the JSON of a result, and check that the same result comes back.

        Args:
            result: What the function returned.

        Returns:
            JSON for `load`.

        Raises:
            TypeError: Results of this type cannot be stored; the message says what to do.
            NotStorable: Results of this type can be stored, and this one cannot.
        """
        if not self._resolved:
            self.resolve()
        if self._form is not None:
            return self._dump_packed(self._form, result)
        if self._to_json is None:
            try:
                if is_native(result):
                    return orjson.dumps(result)
            except (RecursionError, orjson.JSONEncodeError):
                # Reported below, outside of the handler: else the new error would hold this one as its context.
                pass
            raise self._native_refusal(result)
        modes = self._modes
        fault = _WRONG_TYPE
        for mode in modes:
            outcome = self._attempt(self._to_json, mode, result)
            if type(outcome) is bytes:
                if mode is not modes[0]:
                    self._modes = (mode, *(other for other in modes if other is not mode))
                return outcome
            if isinstance(outcome, Difference) and mode is self._plain_mode:
                fault = outcome
        raise self._refusal(self._without_blame(fault, result), result)

    def _resolve(self) -> None:
        returns = self._part(return_annotation(self._function)) if self._returns is None else self._returns
        adapter = None
        try:
            self._form = find_form(returns)
            if self._form is None and not is_json_native_type(returns):
                adapter = type_adapter(with_packed(returns), self._name)
        except Unpackable as fault:
            raise TypeError(f"{self._name}: the annotated result {fault.reason}; {fault.advice}") from None
        # After `type_adapter`, which completes the models.
        description = describe(returns)
        self.schema = description.mark
        self._orders = description.orders
        self._is_annotated = returns is not Any
        if self._form is not None:
            self._holds_packed = True
            self.load = self._form.load
        elif adapter is None:
            self.load = orjson.loads
        else:
            self._to_json = adapter.serializer.to_json
            self._to_python = adapter.serializer.to_python
            self._validate_strictly = partial(adapter.validator.validate_python, strict=True)
            validate = self._validate = adapter.validator.validate_json
            if description.has_aliases:
                self._validate = partial(validate, by_alias=True, by_name=True)
            if not PACKAGES.isdisjoint(sys.modules) and holds_packed(adapter.core_schema):
                self._bound(adapter.core_schema)
            self.load = self._load_models if description.has_models else self._validate
            self._plan(description)
        self._resolved = True

    def _bound(self, core_schema: Any) -> None:
        """Bound what the arrays and tables of one result hold in all; refuse a type that confuses them with texts."""
        if is_ambiguous(core_schema):
            raise TypeError(
                f"{self._name}: the annotated result may have an array or table, and a text or anything, in one place, and "
                "both are texts in JSON; return a class with a field for each, or one of the two"
            )
        to_json, validate = self._to_json, self._validate
        self._holds_packed = True

        def write(result: object, **options: Any) -> bytes:
            with bounded(is_write=True):
                return cast("Callable[..., bytes]", to_json)(result, **options)

        def read(json: bytes | str) -> Any:
            with bounded(is_write=False):
                return validate(json)

        self._to_json, self._validate = write, read

    def _plan(self, description: Schema) -> None:
        """Choose the ways to write a result, the most likely first."""
        options = {"by_alias": False, "round_trip": True, "warnings": "error"}
        plain = self._plain_mode = _Mode(options, keeps_sets=description.has_models)
        modes = [plain, _Mode({**options, "by_alias": True}, keeps_sets=description.has_models)]
        if description.has_models and description.may_omit_unset:
            modes.insert(0, _Mode({**options, "exclude_unset": True}, keeps_sets=False))
        self._modes = tuple(modes)

    def _resolve_and_load(self, json: bytes | str) -> Any:
        self.resolve()
        return self.load(json)

    def _load_models(self, json: bytes | str) -> Any:
        if json and json[0] in _SPACES:
            return self._load_with_sets(json)
        return self._validate(json)

    def _load_with_sets(self, json: bytes | str) -> Any:
        head, _, rest = (json if isinstance(json, bytes) else json.encode()).partition(b"\n")
        try:
            sets, indices = orjson.loads(head[2:-1])
            result = self._validate(rest[:-1])
            for model, index in zip(models_in(result), indices, strict=True):
                _restore(model, sets[index])
        except (TypeError, LookupError, RecursionError):
            raise ValueError("the set fields of the result do not fit its models") from None
        return result

    def copy(self, result: Any) -> Any:
        """Copy a result that is not stored, with all that it holds; raise any error where that cannot be done.

        Args:
            result: What the function returned.
        """
        if self._holds_packed:
            import pickle  # noqa: PLC0415 (large)

            # `deepcopy` takes the objects in columns of pandas as they are.
            with contextlib.suppress(Exception):
                return pickle.loads(pickle.dumps(result))  # noqa: S301 (of this process)
        return copy.deepcopy(result)

    @property
    def is_packed(self) -> bool:
        """Whether results are arrays or tables, which are compressed already."""
        return self._form is not None

    def _dump_packed(self, form: Form, result: object) -> bytes:
        try:
            return dump_checked(form, result)
        except Unpackable as fault:
            refusal = TypeError if fault.is_type else TooLarge if fault.is_size else NotStorable
            text = f"{self._name}: its result {fault.reason}; {'' if fault.is_type else 'to have it stored, '}{fault.advice}"
        raise refusal(text)

    def _native_refusal(self, result: object) -> Exception:
        try:
            fault = find_not_native(result) or _TOO_DEEP
        except RecursionError:
            fault = _TOO_DEEP
        if not fault.is_type:
            return self._refusal(fault, result)
        place = f" at {fault.path}" if fault.path else ""
        annotate = (
            "make the return annotation say exactly what is returned" if self._is_annotated else "annotate the return type"
        )
        # Alone, arrays and tables need no pydantic.
        library = "" if place else type(result).__module__.partition(".")[0]
        needed = _NEEDED.get(library, " (needs 'aiokv[pydantic]')")
        is_scalar = library == "numpy" and getattr(result, "shape", None) == () and hasattr(result, "item")
        plain = cast("Any", result).item() if is_scalar else None
        convert = f"return {type(plain).__name__}(...) of it, " if isinstance(plain, str | int | float) else ""
        return TypeError(
            f"{self._name}: its result{place} {fault.reason}, which JSON would change; "
            f"{convert}{annotate}{needed}, pass returns=, or return {_NATIVE}"
        )

    def _attempt(self, to_json: Callable[..., bytes], mode: _Mode, result: object) -> bytes | Difference:
        """Return the JSON of a result, or why it would not come back."""
        try:
            data = to_json(result, **mode.options)
            back = self._validate(data)
            if mode.keeps_sets:
                models, others = list(models_in(result)), list(models_in(back))
                if len(models) != len(others):
                    return _OTHER_MODELS
                sets = [model.__pydantic_fields_set__ for model in models]
                if any(one != other.__pydantic_fields_set__ for one, other in zip(sets, others, strict=True)):
                    for one, other in zip(sets, others, strict=True):
                        _restore(other, one)
                    data = _with_sets(sets, data)
            found = difference(back, result, self._orders)
        except Exception as error:  # noqa: BLE001 (a class of the program's may fail in its own way)
            return _explain(error, result, self._to_python)
        return data if found is None else found

    def _without_blame(self, fault: Difference, result: object) -> Difference:
        """Return the fault as one of this value alone where the annotation allows for its type."""
        if not fault.is_type or fault.types is None:
            return fault
        back, kind = fault.types
        if issubclass(kind, back):
            owner = self._function.__qualname__.rpartition(".")[0]
            if (back.__module__, back.__qualname__) != (self._function.__module__, owner):
                return fault
            return fault._replace(is_type=False, reason=f"{_SUBCLASS} of {back.__qualname__}, and comes back as that")
        if back in _NATIVE_TYPES and kind not in _NATIVE_TYPES:
            return fault
        try:
            # Accepts what the annotation names. A value of another type may have been written all the same.
            self._validate_strictly(result)
        except Exception:  # noqa: BLE001 (a class of the program's may fail in its own way)
            return fault
        reason = f"comes back as {back.__qualname__}, {_ALIKE}"
        return fault._replace(is_type=False, reason=reason)

    def _refusal(self, fault: Difference, result: object) -> Exception:
        place = f" at {fault.path}" if fault.path else ""
        if fault.is_type:
            return TypeError(
                f"{self._name}: its result of type {type(result).__name__} does not survive the way through JSON as the "
                f"annotated type: it{place} {fault.reason}; make the return annotation say exactly what is returned, "
                "or pass returns="
            )
        default = "return only what the annotated type's JSON holds"
        advice = next((advice for text, advice in _ADVICE if text in fault.reason), default)
        refusal = TooLarge if _OVERSIZE in fault.reason else NotStorable
        return refusal(f"{self._name}: its result{place} {fault.reason}; to have it stored, {advice}")


def _explain(error: Exception, result: object, to_python: Callable[..., object]) -> Difference:  # noqa: PLR0911 (one for each fault)
    """Return why a result could not be written or read back, without the error's text: it quotes the value."""
    if isinstance(error, MemoryError):
        return _TOO_LARGE
    text = str(error)
    if isinstance(error, RecursionError) or text.startswith(_DEEP):
        return _TOO_DEEP
    fault = fault_of(text)
    if fault is not None:
        return Difference("", fault[0], is_type=fault[1])
    if _is_of_wrong_type(result, to_python):
        return _WRONG_TYPE
    reason = find_unholdable(result)
    if reason is not None:
        return Difference("", f"holds {reason}, which has no form in JSON here", is_type=False)
    details: Callable[..., list[dict[str, Any]]] | None = getattr(error, "errors", None)
    if callable(details) and any(detail["type"] in _UNREADABLE for detail in details(include_url=False, include_input=False)):
        return _TOO_DEEP
    return Difference("", f"cannot be written or read back ({type(error).__name__})", is_type=True)


def _is_of_wrong_type(result: object, to_python: Callable[..., object]) -> bool:
    """Return whether pydantic warns of a type, without making text, which could fail for another reason."""
    try:
        to_python(result, warnings="error", round_trip=True)
    except Exception as error:  # noqa: BLE001 (a class of the program's may fail in its own way)
        return str(error).startswith(_WARNED)
    return False


def _with_sets(sets: list[set[str]], data: bytes) -> bytes:
    """Put the set fields of models beside their JSON, equal ones once."""
    numbers: dict[tuple[str, ...], int] = {}
    indices = [numbers.setdefault(tuple(sorted(names)), len(numbers)) for names in sets]
    return b" [" + orjson.dumps([list(numbers), indices]) + b",\n" + data + b"]"


def _restore(model: Any, names: Any) -> None:
    if isinstance(names, str) or any(type(name) is not str for name in names):
        raise TypeError
    # A frozen model refuses plain assignment.
    object.__setattr__(model, "__pydantic_fields_set__", set(names))
