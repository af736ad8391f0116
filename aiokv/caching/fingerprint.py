"""The fingerprint of a function's own code, which stands in its keys: a changed body never gets the results of the old one.

It is a digest of the syntax tree, which is the same in every version of Python. These do not count, since they do not change
results: comments and layout, the docstring, the decorators, and the annotations of parameters and result. Names of parameters
and defaults count. Where the source is missing, or differs from the code that runs, it is a digest of the bytecode. Bytecode
differs between versions of Python, and such processes share no entries with those that have the source.
Functions that the body calls, and globals that it reads, do not count.
"""

import ast
import functools
import hashlib
import inspect
import types
from collections.abc import Callable
from typing import Any

from aiokv.caching.encoding import encode
from aiokv.caching.naming import canonical_module

# The attribute of a function that was shipped from another process; it holds the fingerprint that was made there.
MARK = "__aiokv_fingerprint__"

_DIGEST_BYTES = 8
_MAX_CHAIN = 100
_FUTURE_FLAGS = 0xFF0000 | 0x1000000
_SHAPE_FLAGS = (
    inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Fields of the syntax tree that say nothing of what code does, or that not every version of Python has.
_LEFT_OUT = frozenset({"ctx", "kind", "type_comment"})


def fingerprint(function: Callable[..., object]) -> str:
    """Return a digest of a function's code.

    Where a function wraps another (`functools.wraps`), both count. So does what the wrapper closes over, such as the arguments
    of its decorator, where it can be encoded; an object that cannot counts by its class alone, whatever it holds. An update of
    the package of such a wrapper may change the fingerprint.

    Args:
        function: A function, or another callable. If it has an attribute `__aiokv_fingerprint__`, that is returned.

    Returns:
        16 hexadecimal digits, the same in every process, directory and hash seed.
    """
    return _mark_of(function) or _digest(_describe(function, []))


def _digest(description: object) -> str:
    return hashlib.blake2b(encode(description), digest_size=_DIGEST_BYTES).hexdigest()


def _mark_of(function: Any) -> str | None:
    mark = getattr(function, MARK, None)
    # functools.wraps copies this attribute to the wrapper, whose own code counts, too.
    wrapped = getattr(function, "__wrapped__", None)
    return mark if isinstance(mark, str) and (wrapped is None or getattr(wrapped, MARK, None) != mark) else None


def _describe(function: Any, seen: list[object]) -> object:  # noqa: PLR0911 (one for each kind)
    """Return nested tuples that describe the code that a call of a function runs."""
    for index, known in enumerate(seen):
        if known is function:
            return "again", index
    if len(seen) >= _MAX_CHAIN:
        return "more"
    is_wrapped = bool(seen)
    seen.append(function)
    if mark := _mark_of(function):
        return "mark", mark
    if isinstance(function, functools.partial):
        arguments = (*function.args, *(item for pair in sorted(function.keywords.items()) for item in pair))
        return "partial", _describe(function.func, seen), tuple(_describe_value(value, seen) for value in arguments)
    if isinstance(function, types.MethodType):
        return "method", _describe(function.__func__, seen), _describe_value(function.__self__, seen)
    wrapped = getattr(function, "__wrapped__", None)
    if not isinstance(function, types.FunctionType):
        # A callable object: its class, and the function that it stands for.
        kind = type(function)
        inner = wrapped if wrapped is not None else getattr(function, "func", None)
        named = kind if inner is not None else function
        name = getattr(named, "__module__", None), getattr(named, "__qualname__", kind.__qualname__)
        return "object", str(name[0]), str(name[1]), None if inner is None else _describe(inner, seen)
    code = _describe_source(function, with_annotations=is_wrapped) or _describe_bytecode(function, seen)
    if wrapped is None:
        return "function", code
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return (
        "wrapper",
        code,
        _describe(wrapped, seen),
        tuple((name, _describe_cell(cell, seen)) for name, cell in cells),
        _describe_defaults(function, seen),
    )


def _describe_cell(cell: Any, seen: list[object]) -> object:
    try:
        return _describe_value(cell.cell_contents, seen)
    except ValueError:
        return "empty"


def _describe_defaults(function: types.FunctionType, seen: list[object]) -> object:
    keywords = sorted((function.__kwdefaults__ or {}).items())
    return (
        tuple(_describe_value(value, seen) for value in function.__defaults__ or ()),
        tuple((name, _describe_value(value, seen)) for name, value in keywords),
    )


def _describe_value(value: object, seen: list[object]) -> object:
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial) or hasattr(value, "__wrapped__"):
        return _describe(value, seen)
    try:
        return "value", encode(value)
    except Exception:  # noqa: BLE001 (__cache_key__ of the program's classes may fail in any way)
        kind = type(value)
        return "of", canonical_module(str(kind.__module__)), kind.__qualname__


def _describe_source(function: types.FunctionType, *, with_annotations: bool) -> object:
    """Return the syntax tree of a function as nested tuples, or None where the source is missing or is not what runs."""
    try:
        lines, _ = inspect.getsourcelines(function.__code__)
        is_indented = lines[0][:1].isspace()
        tree = ast.parse(("if 1:\n" if is_indented else "") + "".join(lines))
        found: Any = tree.body[0].body[0] if is_indented else tree.body[0]  # type: ignore[attr-defined]
        if not isinstance(found, _FUNCTIONS) or found.name != function.__code__.co_name:
            return None
        found.decorator_list = []
        if not _is_compiled_from(function, found):
            return None
        return "source", _describe_tree(_essence(found, with_annotations=with_annotations))
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, RecursionError):
        return None


def _is_compiled_from(function: types.FunctionType, node: Any) -> bool:
    """Return whether the source compiles to the code that runs: the file may be newer."""
    code = function.__code__
    parts = function.__qualname__.split(".")
    body: Any = node
    if len(parts) > 1 and parts[-2] != "<locals>":
        # A class, which mangles private names.
        holder: Any = ast.parse(f"class {parts[-2]}: pass").body[0]
        holder.body = [body]
        body = holder
    if free := [name for name in code.co_freevars if name != "__class__"]:
        holder = ast.parse(f"def _():\n {' = '.join(free)} = None").body[0]
        holder.body.append(body)
        body = holder
    module = ast.fix_missing_locations(ast.Module(body=[body], type_ignores=[]))
    compiled = compile(module, "<source>", "exec", flags=code.co_flags & _FUTURE_FLAGS, dont_inherit=True)
    return any(_describe_code(candidate) == _describe_code(code) for candidate in _codes_named(code.co_name, compiled))


def _codes_named(name: str, code: types.CodeType) -> list[types.CodeType]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [found for each in inner for found in ([each] if each.co_name == name else _codes_named(name, each))]


def _essence(node: Any, *, with_annotations: bool) -> Any:
    """Strip the docstring, and the annotations where no decorator may read them."""
    if ast.get_docstring(node, clean=False) is not None:
        node.body = node.body[1:]
    if not with_annotations:
        node.returns, node.type_params = None, []
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
        for argument in every:
            if argument is not None:
                argument.annotation = None
    return node


def _describe_tree(node: Any) -> object:
    if isinstance(node, ast.JoinedStr):
        return "JoinedStr", tuple(map(_describe_tree, _merge_texts(node.values)))
    if isinstance(node, ast.AST):
        # Empty fields are left out, since newer versions of Python have more of them.
        fields = ((name, getattr(node, name, None)) for name in node._fields if name not in _LEFT_OUT)
        return type(node).__name__, tuple((name, _describe_tree(value)) for name, value in fields if value not in (None, []))
    return tuple(map(_describe_tree, node)) if isinstance(node, list) else node


def _merge_texts(values: list[Any]) -> list[Any]:
    """Merge neighbouring texts of an f-string, which versions of Python split in different ways."""
    merged: list[Any] = []
    for value in values:
        if merged and isinstance(value, ast.Constant) and isinstance(merged[-1], ast.Constant):
            merged[-1] = ast.Constant(str(merged[-1].value) + str(value.value))
        elif not isinstance(value, ast.Constant) or value.value:
            merged.append(value)
    return merged


def _describe_bytecode(function: types.FunctionType, seen: list[object]) -> object:
    return "bytecode", _describe_code(function.__code__, function.__doc__), _describe_defaults(function, seen)


def _describe_code(code: types.CodeType, docstring: str | None = None) -> tuple[object, ...]:
    """Return what a code object does as nested tuples: no file, no line numbers, no docstring."""
    constants = [
        _describe_code(constant) if isinstance(constant, types.CodeType) else _describe_value(constant, [])
        for constant in code.co_consts
    ]
    if docstring is not None and code.co_consts[:1] == (docstring,):
        # As in a function without a docstring.
        constants[0] = _describe_value(None, [])
    return (
        code.co_name,
        code.co_code,
        tuple(constants),
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _SHAPE_FLAGS),
        code.co_exceptiontable,
    )
