"""What modules, functions and classes are called in keys and schemas: the same in every process that runs their code."""

import pathlib
import sys


def canonical_module(name: str) -> str:
    """Return a module's name, the same whether the module is imported or run as a script.

    Args:
        name: The `__module__` of a function or a class.

    Returns:
        The name; for `"__main__"` the name that the running script has where it is imported.
    """
    if name != "__main__":
        return name
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        spec_name: str = spec.name
        return spec_name.removesuffix(".__main__")
    file = getattr(main, "__file__", None)
    return pathlib.Path(file).stem if file else "__main__"
