"""The names of modules, functions and classes in keys and schemas: the same in every process that runs their code."""

import sys
import types
import typing
from typing import Any

# The flag of classes that are made at run time; the others are part of the interpreter or of an extension module.
HEAP_TYPE = 1 << 9


SCRIPTS = ("__main__", "__mp_main__", "<run_path>")
"""The module names of scripts: when run, in the children of multiprocessing, and under runpy.run_path."""

_script_names: dict[str, str] = {}
_adopted_names: dict[str, str] = {}


class Unencodable(TypeError):  # noqa: N818 (a TypeError by its base's name)
    """A value without a canonical encoding.

    Args:
        kind: Its class.
        reason: Why, as the end of the sentence "..., which".
        path: Where in the argument it stands.
    """

    def __init__(self, kind: type, reason: str = "has no canonical encoding", path: str = "") -> None:
        super().__init__(f"{kind.__module__}.{kind.__qualname__}, which {reason}")
        self.path = path


def canonical_module(name: str) -> str:
    """Return a module's name, the same whether the module is imported or run as a script.

    Args:
        name: The `__module__` of a function or a class of this process.

    Returns:
        The name. For a script, such as `"__main__"`, it is the name under which the script can be imported.
    """
    if name not in SCRIPTS:
        return name
    home = sys.modules.get(name)
    if home is not None:
        # runpy.run_path, which `fal run` uses, removes the module after the run.
        _script_names[name] = _name_of_script(vars(home))
    return _script_names.get(name, name)


def module_of(named: Any) -> str:
    """Return the module's name of a class, a function or a type variable, also where that was shipped by value.

    Args:
        named: An object with `__module__`.

    Returns:
        The name as from `canonical_module`. For a class that another process shipped, it is the name of the script there.
    """
    name = str(named.__module__)
    if name not in SCRIPTS or find_named(named) is named:
        return canonical_module(name)
    # Code that was shipped by value runs in a process with another __main__. Its functions know their file.
    for function in (named, *vars(named).values()) if isinstance(named, type) else (named,):
        namespace = getattr(function, "__globals__", {})
        if namespace.get("__name__") == name and namespace.get("__file__"):
            return _name_of_script(namespace)
    return _adopted_names.get(name, name) if _was_shipped(named) else canonical_module(name)


def script_names() -> dict[str, str]:
    """Return the canonical names of this process's scripts, for the processes that receive its code."""
    for name in SCRIPTS:
        canonical_module(name)
    return {**_script_names, **_adopted_names}


def adopt_script_names(names: dict[str, str]) -> None:
    """Store the canonical names of scripts of the process that code comes from.

    Args:
        names: What `script_names` returns there.
    """
    _adopted_names.update(names)


def _name_of_script(namespace: dict[str, Any]) -> str:
    spec, file = namespace.get("__spec__"), namespace.get("__file__")
    if spec is not None:
        return str(spec.name).removesuffix(".__main__")
    if not file:
        return "__main__"
    import pathlib  # noqa: PLC0415 (costly to import)

    stem = pathlib.Path(file).stem
    # cloudpickle ships the name of the package, but not the spec.
    package = namespace.get("__package__")
    return stem if not package else str(package) if stem == "__main__" else f"{package}.{stem}"


def _was_shipped(kind: object) -> bool:
    """Return whether cloudpickle made a class here. Its table also holds the classes that this process has sent."""
    made = getattr(sys.modules.get("cloudpickle.cloudpickle"), "_DYNAMIC_CLASS_TRACKER_BY_CLASS", ())
    try:
        return bool(_adopted_names) and kind in made
    except TypeError:
        return False


def find_named(named: Any) -> object:
    """Return the object that has the name of a class or a function in its module, or None."""
    found: object = sys.modules.get(named.__module__)
    for part in str(getattr(named, "__qualname__", None) or getattr(named, "__name__", "")).split("."):
        found = getattr(found, part, None)
    return found


def class_identity(kind: type) -> tuple[object, ...]:
    """Return the identity of a class: module and qualified name, and the arguments of a generic model.

    Args:
        kind: A class.

    Returns:
        Nested tuples of text, and of values that stand in the class's arguments.

    Raises:
        Unencodable: The class is local to a function, or its name leads to another class.
    """
    generic = vars(kind).get("__pydantic_generic_metadata__")
    if generic and generic["origin"] is not None:
        # Page[a.User] and Page[b.User] have the same name.
        return ("generic", class_identity(generic["origin"]), *map(type_identity, generic["args"]))
    name = kind.__qualname__
    if "<locals>" in name:
        raise Unencodable(kind, "is local to a function, each call of which makes another class of that name")
    _check_is_named(kind)
    return ("class", module_of(kind), name)


def type_identity(kind: Any) -> tuple[object, ...]:  # noqa: PLR0911 (one for each kind)
    """Return the identity of an argument of a generic class.

    Args:
        kind: A class, or a type that `typing` makes of classes.

    Returns:
        Nested tuples of text, and of values that stand in the type.

    Raises:
        Unencodable: It is of another kind, or holds a class without a name of its own.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ("literal", arguments)
    if origin is typing.Annotated:
        return ("annotated", type_identity(arguments[0]), arguments[1:])
    if origin in {typing.Union, types.UnionType}:
        return ("union", *map(type_identity, arguments))
    if isinstance(origin, type):
        return ("generic", class_identity(origin), *map(type_identity, arguments))
    if isinstance(kind, type):
        return class_identity(kind)
    if isinstance(kind, list):
        return ("list", *map(type_identity, kind))
    if kind is None or kind is ...:
        return ("value", kind)
    if isinstance(kind, typing.TypeVar):
        return ("variable", module_of(kind), kind.__name__)
    raise Unencodable(type(kind))


def _check_is_named(kind: type) -> None:
    """Refuse a class whose name leads to another object, as pickle does: two classes may have one name."""
    module = kind.__module__
    if sys.modules.get(module) is None or not kind.__flags__ & HEAP_TYPE:
        return
    found = find_named(kind)
    if found is kind or _was_shipped(kind):
        return
    # Code that was shipped by value runs in a process with another __main__.
    if isinstance(found, type) or (found is None and module != "__main__"):
        raise Unencodable(kind, "is not the class that its module has under that name")
