"""The program `aiokv`.

This module stands beside the package, not in it, so that it runs before anything of the package is imported.
"""

import signal


def main() -> int:
    """Run the command line; an interrupt that comes while it is still loaded ends the process as if it had no handler.

    Returns:
        The exit status.
    """
    handler = signal.getsignal(signal.SIGINT)
    # An exception could come inside the initialisation of an extension module, which may crash; an ignored one stays so.
    is_usual = handler is signal.default_int_handler
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from aiokv.cli import main as run  # noqa: PLC0415 (its import takes long enough to be interrupted)

    if is_usual:
        signal.signal(signal.SIGINT, handler)
    return run()
