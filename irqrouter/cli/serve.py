"""``irqrouter serve``: the service for VMs in other processes."""

import argparse
from pathlib import Path
from typing import get_args

from irqrouter.service.config import DEFAULT_PATH, LogLevel

_DESCRIPTION = f"""\
Serves VMs that live in other processes: each VMM links an agent that connects to the socket, carries out what is
decided here, and goes on without it. Runs in the foreground; systemd/irqrouter.service and systemd/irqrouter.socket run
it as a service.

Without --config it reads {DEFAULT_PATH}, if that is there. What is said here wins over the file.
"""

_EPILOG = """\
signals:
  SIGTERM, SIGINT   stop, and remove the sockets that were made here
  SIGHUP            read the configuration again; if it is wrong the old one goes on

exit status: 0 it was told to stop, 1 it failed while serving, 2 it could not begin.

examples:
  irqrouter serve --socket /tmp/agent.socket --admin-socket /tmp/admin.socket --log-level debug
  irqrouter serve --config ./irqrouter.toml
  systemctl enable --now irqrouter.socket       as a service; see docs/service.md
"""


# argparse has no public name for what add_subparsers() returns.
def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",  # pyright: ignore[reportPrivateUsage]
) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "serve",
        help="the service for VMs in other processes",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the configuration, in TOML")
    parser.add_argument("--socket", metavar="PATH", help="where agents connect, unless systemd passes a socket")
    parser.add_argument("--admin-socket", metavar="PATH", help="where administrators connect (varlink), likewise")
    parser.add_argument(
        "--loop",
        choices=["uvloop", "asyncio"],
        default="uvloop",
        help="the event loop to run on (default: uvloop)",
    )
    parser.add_argument("--log-level", choices=get_args(LogLevel), help="what to log, at least")


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    from irqrouter.service import daemon  # pulls in all of the service

    options = daemon.Options(
        config=args.config,
        socket=args.socket,
        admin_socket=args.admin_socket,
        log_level=args.log_level,
        loop=daemon.Loop(args.loop),
    )
    return daemon.run(options)
