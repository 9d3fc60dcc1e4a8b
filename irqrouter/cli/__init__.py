"""The command line: ``irqrouter demo``, ``doctor``, ``serve`` and the others."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from irqrouter.errors import IrqrouterError

_COMMANDS = ("demo", "stress", "torture", "decode", "doctor", "serve", "status", "top", "trace")

_EPILOG = """\
first steps:
  irqrouter doctor                       what this host's kernel can do
  irqrouter demo                         the whole story on a real VM, in seconds
  irqrouter decode msi FEE000B8 0        any word of interrupt remapping, explained
  irqrouter serve                        the service for VMs in other processes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0 fine, 1 what it checked failed, 2 it was called wrongly."""
    parser = argparse.ArgumentParser(
        prog="irqrouter",
        description="Keeps KVM irqfds assigned while nothing changes; after an invalidation it catches the next "
        "interrupt, retranslates it, delivers it and reassigns.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('irqrouter')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {name: importlib.import_module(f"irqrouter.cli.{name}") for name in _COMMANDS}
    for module in commands.values():
        module.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    try:
        status: int = commands[arguments.command].run(arguments)
    except IrqrouterError as error:
        print(f"irqrouter {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status
