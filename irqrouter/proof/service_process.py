"""``irqrouter serve`` as a child of a run: ``python -m irqrouter.proof.service_process OPTIONS``.

It is that command, and one thing more: it ends when the process that holds the other end of its standard input does,
however that ended. So whoever kills a run outright leaves no service behind.
"""

import os
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import entry_points


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def main(arguments: Sequence[str]) -> int:
    """Serve until terminated, or until standard input ends."""
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    (command,) = entry_points(group="console_scripts", name="irqrouter")
    status: int = command.load()(["serve", *arguments])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
