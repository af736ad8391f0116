"""Run programs, each in a fork of this process, which has the packages loaded: many a second, and none sees another.

It reads requests from standard input, a line of JSON each, and answers each with the exit status of its program.
"""

import ast
import asyncio
import inspect
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load_packages() -> None:
    """Load what most programs load."""
    import aiohttp  # noqa: F401, PLC0415 (for the forks)
    import pydantic  # noqa: F401, PLC0415
    import tenacity  # noqa: F401, PLC0415

    import aiokv  # noqa: F401, PLC0415
    from aiokv import kv_cached, kv_cached_many  # noqa: F401, PLC0415


def next_request() -> dict[str, Any] | None:
    """Return a request in a fork of its own; None at the end of the requests, in this process."""
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            request: dict[str, Any] = json.loads(line)
            return request
        _, status = os.waitpid(process, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    return None


def become_program(request: dict[str, Any]) -> None:
    """Take the folder, the environment and the files of a program."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = request["folder"]
    for descriptor, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, "err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(name, flags)
        os.dup2(opened, descriptor)
        os.close(opened)


def main() -> None:
    load_packages()
    request = next_request()
    if request is None:
        return
    become_program(request)
    path = request["path"]
    sys.argv = [path]
    # The interpreter knows the old one by this name until its end.
    program = sys.modules["__main__"] = ModuleType("__main__")
    program.__file__ = path
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT if request["is_notebook"] else 0
    code = compile(Path(path).read_text(encoding="utf-8"), path, "exec", flags)
    # The documents' own code; of a notebook it is a coroutine.
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, vars(program)))
    else:
        exec(code, vars(program))


if __name__ == "__main__":
    main()
