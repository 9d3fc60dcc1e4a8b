"""A service with a fault, made on purpose: it takes an event out of its eventfd while it thinks about it.

It gives the event back before it decides. So as long as it lives nothing is lost, and what it had taken dies with it.
"""

import os
import sys

from irqrouter.proof import service_process
from irqrouter.service import server
from irqrouter.service.session import HARVEST_MAX, Session, _Watched
from irqrouter.service.wire import PREPARED, ROUTED, Slot

_THINKS_S = 0.02


class Taking(Session):
    def _on_fired(self) -> None:
        for fd in self._watch_set.harvest(HARVEST_MAX):
            watched = self._by_fd.get(fd)
            if watched is None:
                continue
            # Not beside an agent that may be at it: what is taken and given back would come a second time.
            if watched.busy or self._page.slot(watched.number).state & (PREPARED | ROUTED):
                self._look(watched, fired=True)
            else:
                self._loop.call_later(_THINKS_S, self._guarded, self._give_back, fd, watched, _take(fd))

    def _give_back(self, fd: int, watched: _Watched, taken: int) -> None:
        if taken and self._by_fd.get(fd) is watched:
            os.eventfd_write(fd, taken)
        self._look(watched, fired=True)
        self._flush()

    def _worth_preparing(self, watched: _Watched, slot: Slot) -> bool:
        return False  # or the agent would serve most events by itself


def _take(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


if __name__ == "__main__":
    server.Session = Taking  # type: ignore[attr-defined]
    sys.exit(service_process.main(sys.argv[1:]))
