"""`aiokv serve`: one process, a supervisor, or one of its workers."""

import logging
import os
from collections.abc import Mapping

from aiokv.server.extra import require_extra
from aiokv.server.listening import Listener, listen
from aiokv.server.options import ServerOptions, resolve_options, unknown_variables
from aiokv.server.seat import Seat
from aiokv.server.supervisor import Supervisor
from aiokv.server.systemd import Notifier, take_sockets

logger = logging.getLogger("aiokv.server")


def serve(flags: Mapping[str, object]) -> int:
    """Serve until SIGTERM or SIGINT, as one process or as several.

    Args:
        flags: The flags of `aiokv serve` that were given, by the option's name.

    Returns:
        The exit status: 0 where all requests under way were finished, 128 and the signal's number where a second one came.

    Raises:
        AioKVError: An option cannot work, the extra is missing, or the store cannot be opened.
    """
    require_extra("aiokv serve")
    seat = Seat.take(os.environ)
    if seat is not None:
        from aiokv.server.process import run_worker  # noqa: PLC0415 (the supervisor needs no event loop)

        return run_worker(seat)
    notifier = Notifier(os.environ)
    sockets = take_sockets(os.environ)
    environment = dict(os.environ)

    def read_options() -> ServerOptions:
        return resolve_options(flags, environment)

    options = read_options()
    for warning in unknown_variables(environment):
        logger.warning("%s", warning)
    if options.workers == 1:
        from aiokv.server.process import run_process  # noqa: PLC0415 (likewise)

        return run_process(read_options, notifier, sockets)
    if sockets:
        listeners = [Listener(sockets, is_own=False)] * options.workers
    else:
        listeners = listen(options.host, options.port, options.workers)
    return Supervisor(read_options, listeners, notifier).run()
