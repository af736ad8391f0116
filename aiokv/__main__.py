"""`python -m aiokv`; the program `aiokv` begins in `aiokv_command`."""

import sys

_INTERRUPTED = 130


def main() -> int:
    """Run the command line; an interrupt ends it quietly, also one that comes while it is still loaded.

    Returns:
        The exit status.
    """
    try:
        from aiokv.cli import main as run  # noqa: PLC0415 (its import takes long enough to be interrupted)

        return run()
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
