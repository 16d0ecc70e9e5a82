"""Command line: ``python -m resnet_fused doctor|verify|demo``."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from resnet_fused.commands import COMMANDS
from resnet_fused.commands.console import CommandError
from resnet_fused.commands.environment import library_version

PROGRAM = "python -m resnet_fused"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    0: done; 1: done, and the verdict is negative, or the command could not run; 2: bad usage;
    130: interrupted; 141: the reader of the output went away.
    """
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except CommandError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more on exit, which would print the error that we swallow.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Fused residual blocks for PyTorch: check the installation, the numbers, "
        "the speed.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())
        + f"\n\n'{PROGRAM} COMMAND --help' shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"resnet_fused {library_version()}")
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not arguments:
        parser.print_help()
        return 2
    chosen = parser.parse_args(arguments)
    if chosen.command not in COMMANDS:
        close = difflib.get_close_matches(chosen.command, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(COMMANDS)}"
        parser.error(f"unknown command {chosen.command!r}: {hint}")
    return _run(chosen.command, chosen.arguments)


def _run(name: str, arguments: list[str]) -> int:
    # Only the chosen command is imported, so that doctor works where PyTorch does not.
    try:
        command = importlib.import_module(f"resnet_fused.commands.{name}")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise CommandError(
            f"{name} cannot start: {type(error).__name__}: {error} (run '{PROGRAM} doctor')"
        ) from error
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    status: int = command.run(parser.parse_args(arguments))
    return status


if __name__ == "__main__":
    sys.exit(main())
