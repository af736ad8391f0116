"""The fingerprint: the same for the same code, wherever and however it runs, and another for any other code."""

import functools
import linecache
import os
import pathlib
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from helpers import REPOSITORY

from aiokv.caching import fingerprint as fingerprints
from aiokv.caching.fingerprint import MARK, fingerprint
from aiokv.caching.keys import KeyMaker

Import = Callable[..., Any]


@pytest.fixture
def load(tmp_path: pathlib.Path) -> Import:
    """Import a source of its own file."""
    count = 0

    def load(source: str, *, name: str = "shapes") -> Any:
        nonlocal count
        count += 1
        folder = tmp_path / str(count)
        folder.mkdir()
        path = folder / f"{name}.py"
        path.write_text(source)
        module = types.ModuleType(name)
        module.__file__ = str(path)
        exec(compile(source, path, "exec"), vars(module))
        return module

    return load


PLAIN = 'async def work(a, b=2):\n    return [a + b, "x", f"{a:>{b}} and"]\n'


@pytest.mark.parametrize(
    "source",
    [
        'async def work( a,\n   b = 2 ):  # why\n\n    # so\n    return [ (a + b), \'x\',\n        f"{a:>{b}} " "and" ]\n',
        'async def work(a, b=2):\n    """Do it."""\n    return [a + b, "x", f"{a:>{b}} and"]\n',
        'async def work(a: int, b: "str" = 2) -> list[object]:\n    return [a + b, "x", f"{a:>{b}} and"]\n',
        f"first = 1\n\n\nasync def other(): ...\n\n\n{PLAIN}\n\nlast = 2\n",
        f"def same(f): return f\n\n@same\n@same\n{PLAIN}",
        f"from __future__ import annotations\n{PLAIN}",
        'if True:\n    async def work(a, b=2):\n        return [a + b, "x", f"{a:>{b}} and"]\n',
    ],
    ids=["layout", "docstring", "annotations", "place", "decorators", "future", "indentation"],
)
@pytest.mark.parametrize("has_source", [True, False])
def test_what_changes_no_result_does_not_count(load: Import, source: str, *, has_source: bool) -> None:
    first, second = load(PLAIN).work, load(source).work
    if not has_source:
        linecache.clearcache()
        for function in (first, second):
            pathlib.Path(function.__code__.co_filename).unlink()
    assert fingerprint(first) == fingerprint(second)
    assert len(bytes.fromhex(fingerprint(first))) == 8


@pytest.mark.parametrize(
    "source",
    [
        PLAIN.replace("a + b", "a - b"),
        PLAIN.replace('"x"', '"y"'),
        PLAIN.replace('"x"', 'b"x"'),
        PLAIN.replace('"x"', "1"),
        PLAIN.replace('"x"', "True"),
        PLAIN.replace('"x"', "1.0"),
        PLAIN.replace('"x"', "None"),
        PLAIN.replace('"x"', "..."),
        PLAIN.replace('"x"', "other"),
        PLAIN.replace('"x"', "{1, 2}"),
        PLAIN.replace('"x"', "lambda: 1"),
        PLAIN.replace('"x"', "lambda: 2"),
        PLAIN.replace('"x"', "[c for c in a]"),
        PLAIN.replace(" and", " or"),
        PLAIN.replace(":>", ":<"),
        PLAIN.replace("b=2", "b=3"),
        PLAIN.replace("b=2", "*, b=2"),
        PLAIN.replace("a, b=2", "a, b=2, *c"),
        PLAIN.replace("a, b=2", "a, b=2, **c"),
        PLAIN.replace("a, b=2", "a, /, b=2"),
        PLAIN.replace("    return", "    await a\n    return"),
        PLAIN.replace("    return", "    pass\n    return"),
        PLAIN.replace("work", "other") + "work = other\n",
        PLAIN.replace("(a, b=2)", "(c, b=2)").replace("a +", "c +").replace("{a:", "{c:"),
    ],
)
@pytest.mark.parametrize("has_source", [True, False])
def test_what_may_change_a_result_counts(load: Import, source: str, *, has_source: bool) -> None:
    first, second = load(PLAIN).work, load(source).work
    if not has_source:
        if "    pass" in source:
            return  # which leaves no bytecode
        linecache.clearcache()
        for function in (first, second):
            pathlib.Path(function.__code__.co_filename).unlink()
    assert fingerprint(first) != fingerprint(second)


def test_source_that_is_not_what_runs_does_not_count(load: Import) -> None:
    # Such as of a program that was updated while it runs.
    old, new = load(PLAIN).work, load(PLAIN.replace("a + b", "a * b")).work
    pathlib.Path(old.__code__.co_filename).write_text(pathlib.Path(new.__code__.co_filename).read_text())
    linecache.clearcache()
    assert fingerprint(old) != fingerprint(new)
    pathlib.Path(new.__code__.co_filename).write_text("")
    linecache.clearcache()
    assert fingerprint(old) != fingerprint(new)


SHAPES = '''
import functools

class Service:
    __secret = 1

    async def mangled(self, a):
        """Do it."""
        return self.__secret, a

    async def above(self):
        return super().__init__(), __class__

    class Inner:
        async def text(self):
            return """
one
  two
"""

def scaled(by):
    def decorate(function):
        @functools.wraps(function)
        async def wrapper(*args, **kwargs):
            return by * await function(*args, **kwargs)
        return wrapper
    return decorate

@scaled(2)
async def wrapped(a): return a
'''


@pytest.mark.parametrize("name", ["Service.mangled", "Service.above", "Service.Inner.text", "wrapped"])
def test_source_is_taken_of_every_kind_of_function(load: Import, name: str) -> None:
    function = functools.reduce(getattr, name.split("."), load(SHAPES))
    assert fingerprints._describe_source(function, with_annotations=False) is not None


def test_source_is_taken_of_a_closure() -> None:
    free = 1

    async def closure() -> object:
        return free

    assert fingerprints._describe_source(closure, with_annotations=False) is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("@scaled(2)", "@scaled(3)"),
        ("@scaled(2)", "@scaled(2)\n@scaled(2)"),
        ("wrapped(a): return a", "wrapped(a): return -a"),
        ("wrapped(a)", "wrapped(a: int)"),
        ("return by *", "return by +"),
        ("@scaled(2)", "@scaled(len)"),
        ("@scaled(2)", "@scaled(lambda: 2)"),
    ],
)
def test_function_counts_with_what_is_around_it(load: Import, old: str, new: str) -> None:
    assert old in SHAPES
    first, second, again = (load(source).wrapped for source in (SHAPES, SHAPES.replace(old, new), SHAPES))
    assert fingerprint(first) == fingerprint(again) != fingerprint(second)


def test_arguments_of_a_decorator_that_are_functions_count_by_their_code(load: Import) -> None:
    first, second = (load(SHAPES.replace("@scaled(2)", f"@scaled(lambda: {number})")).wrapped for number in (2, 3))
    assert fingerprint(first) != fingerprint(second)


def test_wrapped_function_counts_where_the_wrapper_does_not_close_over_it(load: Import) -> None:
    source = "async def inner(a): return a\n\nasync def outer(*args): return await inner(*args)\n\nouter.__wrapped__ = inner\n"
    first, second, again = (
        fingerprint(load(text).outer) for text in (source, source.replace("return a\n", "return -a\n"), source)
    )
    assert first == again != second


def test_partial_of_a_decorator_counts_with_its_arguments(load: Import) -> None:
    parts = "import functools\n" + SHAPES
    sources = [parts.replace("@scaled(2)", f"@scaled(functools.partial(pow, {number}))") for number in (2, 3, 2)]
    first, second, again = (fingerprint(load(source).wrapped) for source in sources)
    assert first == again != second


class Broken:
    def __cache_key__(self) -> object:
        raise OSError


def test_object_that_cannot_be_encoded_counts_by_its_class(load: Import) -> None:
    module = load(SHAPES)
    first, second, other = (fingerprint(module.scaled(value)(module.wrapped)) for value in (Broken(), Broken(), object()))
    assert first == second != other


def test_fingerprint_that_a_function_brings_along_wins(load: Import) -> None:
    function = load(PLAIN).work
    setattr(function, MARK, "brought")
    assert fingerprint(function) == "brought"
    assert KeyMaker(function)((1,), {}).startswith("shapes.work:brought:")


def test_wrapper_does_not_pass_for_the_function_whose_fingerprint_it_copied(load: Import) -> None:
    function = load(PLAIN).work
    setattr(function, MARK, "brought")

    @functools.wraps(function)
    async def wrapper(*args: object) -> object:
        return await function(*args)

    assert getattr(wrapper, MARK) == "brought" != fingerprint(wrapper)


class Called:
    __qualname__ = "called"

    def __init__(self, function: object) -> None:
        self.__wrapped__ = function

    async def __call__(self, *_args: object) -> None: ...


def test_object_that_is_called_counts_with_what_it_wraps(load: Import) -> None:
    first, second = (Called(load(source).work) for source in (PLAIN, PLAIN.replace("a + b", "a - b")))
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first) == fingerprint(Called(load(PLAIN).work))
    assert fingerprint(len) != fingerprint(print)  # type: ignore[arg-type]


def test_functions_that_wrap_each_other_have_a_fingerprint() -> None:
    async def one() -> None: ...

    async def other() -> None: ...

    one.__wrapped__, other.__wrapped__ = other, one  # type: ignore[attr-defined]
    assert fingerprint(one) != fingerprint(other)


# The package alone, whose requirements other interpreters need not have.
RUN = f"""
import sys, types
package = types.ModuleType("aiokv")
package.__path__ = [{str(REPOSITORY / "aiokv")!r}]
sys.modules["aiokv"] = package
"""
PRINT = """
from aiokv.caching.fingerprint import fingerprint, _describe_source
import sys
functions = [Service.mangled, Service.above, Service.Inner.text, wrapped, many]
sys.stdout.write(" ".join(map(fingerprint, functions)))
"""
MANY = '''
async def many(a, /, b=f"{1!r:>{2}}{{", *c, d: int = 2, **e) -> str:
    """Do it."""
    x: int = 1
    async with a as f, b:
        async for g in a:
            yield_ = [h async for h in g if h]
    match a:
        case {"k": [1, *_]} | None:
            del b
    try:
        raise ValueError(f"{a=} {b!r:{c}.{d}} " "x" f"y{e:}")
    except* ValueError as error:
        global z
    def inner(q: int, *, r=1) -> int:
        """Inner."""
        return lambda s=-1: {**e, "t": (yield q)}
    return u"x" in {"a", "b"}, 1j, b"y", ..., not a, x if a else b, a[1:2, ::3]
'''


def _running(name: str) -> str:
    """Return the path of an interpreter that runs; one on the PATH may be a stand-in that leads nowhere."""
    path = shutil.which(name) or ""
    return path if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0 else ""


def interpreters() -> list[str]:
    """Find the interpreters of this machine that aiokv supports."""
    found = {sys.version_info[:2]: sys.executable}
    roots = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")) / "versions"
    for minor in (11, 12, 13):
        paths = [*map(str, roots.glob(f"3.{minor}.*/bin/python"))] or [_running(f"python3.{minor}")]
        if paths[0]:
            found.setdefault((3, minor), paths[0])
    return list(found.values())


def output_of(interpreter: str, folder: pathlib.Path, *arguments: str, seed: str = "0") -> str:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [interpreter, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def script(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "main.py").write_text(RUN + SHAPES + MANY + PRINT)
    return tmp_path


def test_fingerprint_is_the_same_in_every_version_of_python(script: pathlib.Path) -> None:
    outputs = {output_of(interpreter, script, "main.py") for interpreter in interpreters()}
    assert len(outputs) == 1
    assert len(set(outputs.pop().split())) == 5


@pytest.mark.parametrize("has_source", [True, False])
def test_fingerprint_is_the_same_however_code_is_run(script: pathlib.Path, *, has_source: bool) -> None:
    other = script / "deeply" / "nested"
    other.mkdir(parents=True)
    (other / "main.py").write_text((script / "main.py").read_text())
    arguments = ["main.py"], ["-c", "import main"], ["-m", "main"], ["-O", "main.py"], [str(other / "main.py")]
    if not has_source:
        arguments = tuple(
            [part.replace("main.py", "main.pyc") for part in command] for command in arguments if "-O" not in command
        )
        for folder in (script, other):
            output_of(sys.executable, folder, "-c", "import py_compile; py_compile.compile('main.py', 'main.pyc')")
            (folder / "main.py").unlink()
    outputs = {output_of(sys.executable, script, *command, seed=seed) for command in arguments for seed in ("0", "1", "4242")}
    assert len(outputs) == 1


def test_scripts_of_one_name_share_no_keys(tmp_path: pathlib.Path) -> None:
    program = "from aiokv.caching.keys import KeyMaker\n{}\nprint(KeyMaker(work)((1,), {{}}))\n"
    keys = set()
    for index, source in enumerate((PLAIN, PLAIN.replace("a + b", "a - b"))):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "main.py").write_text(f"import sys\nsys.path.append({str(REPOSITORY)!r})\n" + program.format(source))
        keys.add(output_of(sys.executable, folder, "main.py"))
    assert len(keys) == 2
    assert all(key.startswith("main.work:") for key in keys)
