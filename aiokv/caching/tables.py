"""How tables of pandas and Arrow are stored: as a stream of Arrow IPC, checked before Arrow reads it. Nothing is unpickled."""

import importlib
import struct
import sys
from typing import Any, Final

from aiokv.caching.columns import Known, compact, count_bytes
from aiokv.caching.frames import Composer, Described, looks_same, pandas_class
from aiokv.caching.jsonable import is_native
from aiokv.caching.packing import check_head, check_size, pack_content, unpack_content
from aiokv.caching.padding import bytes_of
from aiokv.caching.unpackable import Unpackable

_CONTINUATION: Final = 0xFFFFFFFF
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_MAX_ROWS_WITHOUT_BYTES = 2**24
# Arrow has no type for these, or one of another size; by the kind and size of a dtype of numpy.
_VIEWS: Final = {"b1": "u1", "f2": "u2", "c8": "f4", "c16": "f8", "M8": "i8", "m8": "i8"}
_TYPES: Final = frozenset({"i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"})
_PANDAS, _ARROW = "pandas", "arrow"
_EXTENSION: Final = b"ARROW:extension:name"
_TEXTS: Final = "texts"
_EXACTLY = "make the return annotation say exactly what is returned, or pass returns="


def import_arrow(name: str) -> Any:
    """Return pyarrow.

    Args:
        name: The class of what is to be stored, for messages.

    Raises:
        Unpackable: It is not installed.
    """
    try:
        importlib.import_module("pyarrow.ipc")
    except ImportError:
        raise Unpackable(f"is a {name}, and pyarrow is not installed", "pip install 'aiokv[pandas]'", is_type=True) from None
    return sys.modules["pyarrow"]


class FrameForm:
    """Tables, series or indexes of pandas.

    Args:
        kind: The annotated class.

    Raises:
        Unpackable: It is a subclass of the program's, or pyarrow is not installed.
    """

    def __init__(self, kind: type) -> None:
        self._class = kind
        self._name = pandas_class(kind)
        self._arrow = import_arrow(f"pandas.{self._name}")

    def dump(self, value: Any) -> bytes:
        """Make the JSON text of a table; raise `Unpackable` where a part has no description."""
        if not isinstance(value, self._class):
            raise Unpackable(
                f"is of type {type(value).__qualname__}, and {self._class.__qualname__} is annotated", _EXACTLY, is_type=True
            )
        described = Described(value, is_bounded=True)
        check_head(described.attributes)
        if type(described.attributes) is not dict or not is_native(described.attributes):
            raise Unpackable(
                "has attrs that JSON does not hold", "keep only str, int, float, bool, None, list and dict in them"
            )
        head = [_PANDAS, described.text, described.attributes]
        return pack_content(head, [self._write(described.columns)])

    def load(self, json: bytes | str) -> Any:
        """Make a new table, which its caller may change; raise where the text is none of the annotated class."""
        (kind, text, attributes), body = unpack_content(json)
        if kind != _PANDAS or text[0] != self._name or not isinstance(attributes, dict):
            raise ValueError("the stored content is no such table")
        value = Composer(self._read(body, text)).compose(text, attributes)
        if not isinstance(value, self._class):
            raise ValueError("the stored content is of another class")  # noqa: TRY004 (of stored data)
        return value

    def is_same(self, back: Any, value: Any) -> bool:
        """Return whether a table came back as it was."""
        one, other = Described(back), Described(value)
        return (
            looks_same(back, value)
            and one.text == other.text
            and repr(one.attributes) == repr(other.attributes)
            and self._write(one.columns) == self._write(other.columns)
        )

    def _write(self, columns: list[Any]) -> memoryview:
        """Write columns of any lengths as one row of lists."""
        arrow = self._arrow
        arrays = []
        for column in columns:
            values = self._to_arrow(column)
            arrays.append(arrow.LargeListArray.from_arrays(arrow.array([0, len(values)], arrow.int64()), values))
        batch = arrow.RecordBatch.from_arrays(arrays, names=[str(number) for number in range(len(arrays))])
        return _write_stream(arrow, batch.schema, [batch])

    def _to_arrow(self, column: Any) -> Any:
        arrow = self._arrow
        try:
            if isinstance(column, list):
                return arrow.array(column, arrow.large_string())
            if isinstance(column, arrow.Array):
                return compact(column, arrow, {})
            code = column.dtype.str[1:].partition("[")[0]
            view = _VIEWS.get(code, code)
            return arrow.array(column.view(view) if view in _TYPES else bytes_of(column, sys.modules["numpy"]))
        except (arrow.ArrowException, UnicodeError, TypeError, ValueError) as error:
            raise Unpackable(
                f"has a column that Arrow cannot hold ({type(error).__qualname__})", "convert it to another type"
            ) from None

    def _read(self, body: memoryview, text: Any) -> list[Any]:
        roles: dict[int, str] = {}
        _find_roles(text, roles)
        _, batches = _open_stream(self._arrow, body)
        if len(batches) != 1 or batches[0].num_rows != (1 if batches[0].num_columns else 0):
            raise ValueError("the stored table is not one row of lists")
        if sum(column.nbytes for column in batches[0].columns) > len(body):
            # Each is copied, so that few bytes would fill the memory.
            raise ValueError("stored columns share their bytes")
        return [self._from_arrow(column.flatten(), roles.get(number)) for number, column in enumerate(batches[0].columns)]

    def _from_arrow(self, values: Any, role: str | None) -> Any:
        if role is None:
            return values
        if values.null_count:
            raise ValueError("a stored column has nulls")
        if role == _TEXTS:
            return values.to_pylist()
        numpy: Any = sys.modules["numpy"]
        dtype = numpy.dtype(role).newbyteorder("=")
        if dtype.hasobject:
            raise ValueError("a stored column holds objects")
        # A copy, which its caller may write to.
        array = numpy.array(values.to_numpy())
        if dtype.kind == "b" and array.size and array.max() > 1:
            raise ValueError("a stored bool is neither 0 nor 1")
        return array.view(dtype)


class ArrowForm:
    """Tables or record batches of Arrow, with schema and metadata. Chunks may be divided anew.

    Args:
        kind: `pyarrow.Table` or `pyarrow.RecordBatch`.
    """

    def __init__(self, kind: type) -> None:
        self._arrow = import_arrow(f"pyarrow.{kind.__name__}")
        self._class: Any = kind

    def dump(self, value: Any) -> bytes:
        """Make the JSON text of a table; raise `Unpackable` where Arrow cannot write it."""
        if type(value) is not self._class:
            raise Unpackable(
                f"is of type {type(value).__qualname__}, and {self._class.__qualname__} is annotated", _EXACTLY, is_type=True
            )
        # Before anything is copied.
        check_size(sum(count_bytes(column, self._arrow) for batch in self._batches(value) for column in batch.columns))
        return pack_content([_ARROW, self._class.__name__], [self._write(value)])

    def load(self, json: bytes | str) -> Any:
        """Make a new table, which nobody can change; raise where the text is none of the annotated class."""
        head, body = unpack_content(json)
        if head != [_ARROW, self._class.__name__]:
            raise ValueError("the stored content is no such table")
        schema, batches = _open_stream(self._arrow, body)
        if self._class is self._arrow.Table:
            return self._arrow.Table.from_batches(batches, schema)
        (batch,) = batches
        return batch

    def is_same(self, back: Any, value: Any) -> bool:
        """Return whether a table came back as it was."""
        return (
            back.schema.equals(value.schema, check_metadata=True)
            and back.num_rows == value.num_rows
            # Bytes first: NaN does not equal itself.
            and (self._write(back) == self._write(value) or back.equals(value))
        )

    def _batches(self, value: Any) -> list[Any]:
        return value.to_batches() if self._class is self._arrow.Table else [value]

    def _write(self, value: Any) -> memoryview:
        make, known = self._arrow.RecordBatch.from_arrays, Known()
        try:
            seen = [
                make([compact(column, self._arrow, known) for column in batch.columns], schema=value.schema)
                if batch.columns
                else batch
                for batch in self._batches(value)
            ]
            return _write_stream(self._arrow, value.schema, seen)
        except self._arrow.ArrowException as error:
            reason = f"cannot be written as Arrow IPC ({type(error).__qualname__})"
            raise Unpackable(reason, "return columns of Arrow's own types") from None


def find_table_form(kind: type) -> FrameForm | ArrowForm | None:
    """Find how values of a class of pandas or pyarrow are stored.

    Args:
        kind: Any class.

    Returns:
        The form, or None where the class is none of the supported ones.

    Raises:
        Unpackable: It is a subclass of the program's, or pyarrow is not installed.
    """
    if pandas_class(kind) is not None:
        return FrameForm(kind)
    arrow: Any = sys.modules.get("pyarrow")
    return ArrowForm(kind) if kind in {getattr(arrow, "Table", None), getattr(arrow, "RecordBatch", None)} else None


def _check_fields(fields: Any, arrow: Any) -> None:
    """Refuse names that are not UTF-8, which Arrow decodes where they are used, and types that are not registered here."""
    for field in fields:
        str(field.name)
        # Arrow reads a column of an unknown extension type as one of the type in which that stores its values.
        if _EXTENSION in (field.metadata or {}):
            raise ValueError("the stored table has an extension type that is unknown here")
        kind = field.type
        if isinstance(kind, arrow.BaseExtensionType):
            kind = kind.storage_type
        if arrow.types.is_dictionary(kind):
            kind = kind.value_type
        _check_fields([kind.field(number) for number in range(kind.num_fields)], arrow)


def _find_roles(described: Any, roles: dict[int, str]) -> None:
    """Find which columns are arrays of numpy, with their dtypes, and which are texts; the others are Arrow's."""
    if type(described) is not list or not described:
        return
    if described[0] == "plain":
        _, number, dtype = described
        roles[number] = dtype
        return
    if described[0] == "objects" or described[0] == "string":
        roles[described[2]] = _TEXTS
    for part in described:
        _find_roles(part, roles)


def _write_stream(arrow: Any, schema: Any, batches: list[Any]) -> memoryview:
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return memoryview(sink.getvalue())


def _open_stream(arrow: Any, body: memoryview) -> tuple[Any, list[Any]]:
    """Read a stream into its schema and batches, each checked in full."""
    _check_messages(body)
    batches = []
    with arrow.ipc.open_stream(arrow.py_buffer(body)) as reader:
        for batch in reader:
            batch.validate(full=True)
            batches.append(batch)
        schema = reader.schema
    _check_fields(schema, arrow)
    if sum(batch.num_rows for batch in batches) > max(8 * len(body), _MAX_ROWS_WITHOUT_BYTES):
        raise ValueError("the stored table has more rows than bits")
    return schema, batches


def _check_messages(body: memoryview) -> None:
    """Refuse compressed columns, which could fill the memory: `pack_content` compresses the whole."""
    at = 0
    while at < len(body):
        mark, size = struct.unpack_from("<Ii", body, at)
        if mark != _CONTINUATION or size < 0:
            raise ValueError("the stored table is no Arrow IPC stream")
        if size == 0:
            return
        at += 8
        message = _FlatTable(body[at : at + size], 0)
        at += size + message.number(3, "<q")
        kind = message.number(1, "<B")
        batch = message.table(2) if kind in {_DICTIONARY_BATCH, _RECORD_BATCH} else None
        if batch is not None and kind == _DICTIONARY_BATCH:
            batch = batch.table(1)
        if batch is not None and batch.position_of(3):
            raise ValueError("the stored table has compressed columns")
        if message.number(3, "<q") < 0:
            raise ValueError("the stored table is no Arrow IPC stream")


class _FlatTable:
    """A table of the FlatBuffers format, of which Arrow makes the heads of messages."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data = data
        self._start = at + int(struct.unpack_from("<I", data, at)[0])
        self._fields = self._start - int(struct.unpack_from("<i", data, self._start)[0])
        self._fields_bytes = int(struct.unpack_from("<H", data, self._fields)[0])

    def position_of(self, field: int) -> int:
        """Return where a field stands, or 0 where it is not set."""
        entry = 4 + 2 * field
        offset = struct.unpack_from("<H", self._data, self._fields + entry)[0] if entry < self._fields_bytes else 0
        return self._start + int(offset) if offset else 0

    def number(self, field: int, format_: str) -> int:
        """Return a number, or 0 where it is not set."""
        position = self.position_of(field)
        return int(struct.unpack_from(format_, self._data, position)[0]) if position else 0

    def table(self, field: int) -> "_FlatTable | None":
        """Return a table inside, or None where it is not set."""
        position = self.position_of(field)
        return _FlatTable(self._data, position) if position else None
