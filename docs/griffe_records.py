"""Show the constructor of a class of fields: one of `aiokv.record.Record`, or a named tuple."""

import ast
from typing import Any

from griffe import Attribute, Class, Extension, Function, ObjectNode, Parameter, ParameterKind, Parameters


class Records(Extension):
    """Give such a class an `__init__` of its annotated fields, as a dataclass has."""

    def on_class_members(self, *, node: ast.AST | ObjectNode, cls: Class, **_: Any) -> None:
        """Add the constructor."""
        bases = {str(base).split(".")[-1].split("[")[0] for base in cls.bases}
        if not bases & {"Record", "NamedTuple"} or "__init__" in cls.members or not isinstance(node, ast.ClassDef):
            return
        by_name = any(keyword.arg == "kw_only" for keyword in node.keywords)
        kind = ParameterKind.keyword_only if by_name else ParameterKind.positional_or_keyword
        # Constants of the class are no fields.
        fields = [
            Parameter(name, annotation=field.annotation, kind=kind, default=field.value)
            for name, field in cls.members.items()
            if isinstance(field, Attribute)
            and field.annotation is not None
            and not str(field.annotation).startswith("ClassVar")
        ]
        itself = Parameter("self", kind=ParameterKind.positional_or_keyword)
        constructor = Function("__init__", parameters=Parameters(itself, *fields), returns="None")
        cls.set_member("__init__", constructor)
