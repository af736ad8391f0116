"""`aiokv serve`: its flags are those of the server's options."""

import argparse


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`.

    Args:
        parser: That of the command.
    """
    from aiokv.server.options import add_flags  # noqa: PLC0415 (the other commands need no server)

    parser.formatter_class = argparse.HelpFormatter
    parser.description = (
        "Serve a store over HTTP until SIGTERM or Ctrl-C; a second one, half a second later or more, ends it at once. One line "
        "on standard error gives the address once connections are accepted. SIGHUP reads access file, certificate and "
        "configuration again, and opens the log file again."
    )
    parser.epilog = (
        "Each option can stand in the environment, such as AIOKV_SERVE_MAX_CONNECTIONS, or in the file of --config, such as "
        "`max-connections = 1000`. The first of flag, environment, file and default counts. `none` lifts a bound."
    )
    add_flags(parser)
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    from aiokv.server.command import serve  # noqa: PLC0415 (`--help` needs none of it)

    return serve(vars(options))
