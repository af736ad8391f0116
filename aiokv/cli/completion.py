"""`aiokv completion`: a script by which a shell completes commands and options."""

import argparse

from aiokv.errors import ConfigurationError

_SHELLS = ("bash", "zsh", "tcsh")

_EPILOG = """\
examples: aiokv completion bash > ~/.local/share/bash-completion/completions/aiokv
          aiokv completion zsh > ~/.zfunc/_aiokv          (with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc)
          aiokv completion tcsh | sudo tee /etc/profile.d/aiokv.completion.csh

It needs the extra `cli` where the script is made: pip install 'aiokv[cli]'. The script itself needs nothing.
"""


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `completion`.

    Args:
        parser: That of the command.
    """
    parser.epilog = _EPILOG
    parser.add_argument("shell", choices=_SHELLS)
    parser.set_defaults(run=_completion)


def _completion(options: argparse.Namespace) -> int:
    try:
        import shtab  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ConfigurationError("completion of a shell is made by shtab: pip install 'aiokv[cli]'") from error
    from aiokv.cli import make_parser  # noqa: PLC0415 (it adds the arguments of this command)

    print(shtab.complete(make_parser(None), shell=options.shell))
    return 0
