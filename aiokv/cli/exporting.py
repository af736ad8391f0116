"""`aiokv export`: the entries of a namespace as lines that `aiokv import` reads."""

import argparse
import asyncio
import contextlib
import os
import stat
import sys
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import BinaryIO

from aiokv.backends.capabilities import MAX_BATCH_KEYS, KeyInfo
from aiokv.cli.entries import add_url, seconds_left
from aiokv.cli.paths import InUseError, check_no_store, open_locked
from aiokv.cli.progress import Progress
from aiokv.cli.rows import count_rows, format_row
from aiokv.cli.terminal import binary_output, naming, print_message
from aiokv.limits import MIN_TTL_SECONDS
from aiokv.store import AsyncKVStore

_READ_BYTES = 4 * 1024 * 1024
_STDOUT = "-"
# Values are their owner's alone.
_PRIVATE_MODE = 0o600

_EPILOG = """\
examples: aiokv export --db settings -o settings.jsonl
          aiokv export --db settings --prefix user: | gzip > users.jsonl.gz

A line is {"key": "k", "value": "v", "ttl": 3600}: ttl is what the entry has left, in seconds, and 60 where that is less, the
shortest that a store takes. What expires or is deleted meanwhile is left out. The store must be able to list its keys.
With -o the file is there whole, or not at all.
"""


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`.

    Args:
        parser: That of the command.
    """
    parser.epilog = _EPILOG
    parser.add_argument("--db", dest="db_name", metavar="DB", required=True, help="the namespace")
    parser.add_argument("--prefix", metavar="P", default="", help="export the keys that begin with this alone")
    parser.add_argument("-o", "--output", metavar="FILE", default=_STDOUT, help="the file (default: standard output)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_url(parser)
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    async def run(output: BinaryIO, progress: Progress) -> int:
        rows = written_bytes = 0
        async with AsyncKVStore(options.db_name, url=options.url) as store:
            async for infos in _chunks(store, options.prefix):
                values = await store.get_many([info.key for info in infos])
                for info in infos:
                    value = values[info.key]
                    if value is not None:
                        rows += 1
                        written_bytes += output.write(format_row(info.key, value, max(MIN_TTL_SECONDS, seconds_left(info))))
                progress.show(written_bytes, rows)
        output.flush()
        return rows

    if options.output.lower().endswith(".csv"):
        raise ValueError(f"{options.output}: an export is JSON lines, not CSV; name a file that ends in .jsonl by export -o")
    check_no_store(AsyncKVStore(options.db_name, url=options.url).url, options.output, "export -o")
    with _open_output(options.output) as output, Progress("export", is_quiet=options.quiet) as progress:
        rows = asyncio.run(run(output, progress))
    print_message(f"{count_rows(rows)} exported")
    return 0


async def _chunks(store: AsyncKVStore, prefix: str) -> AsyncGenerator[list[KeyInfo]]:
    """Yield what a listing has in parts whose values are read at once."""
    infos: dict[str, KeyInfo] = {}
    read_bytes = 0
    async for info in store.keys(prefix):
        if infos and (len(infos) >= MAX_BATCH_KEYS or read_bytes + info.value_bytes > _READ_BYTES):
            yield list(infos.values())
            infos, read_bytes = {}, 0
        infos[info.key] = info
        read_bytes += info.value_bytes
    if infos:
        yield list(infos.values())


@contextlib.contextmanager
def _open_output(name: str) -> Generator[BinaryIO]:
    """Open what is written to; a file takes its name once it is whole."""
    path = Path(name)
    if name == _STDOUT or (path.exists() and sys.stdout is not None and os.path.samestat(path.stat(), os.fstat(1))):
        yield binary_output()
        return
    if path.exists() and (not path.is_file() or path.absolute().is_relative_to("/dev")):
        # A device, a pipe, or a stream that is open already, such as /dev/stderr.
        with naming(name), path.open("ab") as stream:
            yield stream
        return
    path = Path(os.path.realpath(name))
    # A kill leaves it behind, and the next export to this file takes it over.
    new = path.with_name(f"{path.name}.aiokv-new")
    try:
        file = open_locked(new, "ab", "export", "-o FILE", _open_private)
    except InUseError as error:
        raise ValueError(str(error)) from None
    except OSError as error:
        error.filename = str(new) if new.exists() else name
        raise
    # Closing it ends the lock, so that comes last.
    with naming(name), file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink != 1:
            # Somebody else could read what is written to it, or would lose what is in it.
            raise ValueError(f"{new} is in the way of export -o: it is another user's, or has another name, too; move it away")
        try:
            os.fchmod(file.fileno(), _PRIVATE_MODE)
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def _open_private(path: str, flags: int) -> int:
    # In a folder of several users it may be somebody's link.
    return os.open(path, flags | os.O_NOFOLLOW, _PRIVATE_MODE)
