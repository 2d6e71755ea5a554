"""torchrun, with titan's exit code and with time to save.

    python -m titan.launch.torchrun [torchrun's flags] -m titan.train [overrides]

Three things that torchrun does to what supervises it (Kubernetes, SkyPilot), and that cost a run:

- It exits with 1 whatever its ranks exit with, so that "the config is wrong" (2) is tried again and again and
  "requeue me" (75) counts as a crash.
- On SIGTERM it kills the ranks after 30 s, and exits with 1. Here SIGTERM goes to the ranks, which save and exit with
  75; the limit is the supervisor's own grace period.
- On several machines, the agent on the one where they meet ends as soon as its own ranks have ended. Another, whose
  ranks are a moment slower, finds it gone, kills them and exits with 1. Here it waits for what they have to say.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.run import main as torchrun

from titan.errors import Stopped
from titan.launch.signals import tell_ranks

_TELL_SECONDS = 1.0
_END_SECONDS = 2.0
"""How long torchrun may take to see that its ranks have ended, and to end with their exit code."""
_ALONE_SECONDS = 60.0
"""How long an agent's ranks may live on after it has lost the machine where the agents meet."""


def patient(num_nodes_waiting: Callable[[Any], int], seconds: float = _ALONE_SECONDS) -> Callable[[Any], int]:
    """Return what an agent asks the others as long as its ranks live, with patience where there is no answer."""
    alone_since: float | None = None

    def ask(handler: Any) -> int:
        nonlocal alone_since
        try:
            answer = num_nodes_waiting(handler)
        except RendezvousConnectionError:
            now = time.monotonic()
            alone_since = now if alone_since is None else alone_since
            if now - alone_since > seconds:
                raise
            return 0
        alone_since = None
        return answer

    return ask


def pass_on(signals: int) -> None:
    """After a SIGTERM, tell the ranks, and those after them: torchrun may restart them once they have saved and ended.

    Where there are none, or none any more, there is nothing left to do.
    """
    while os.read(signals, 1)[0] != signal.SIGTERM:
        pass
    told: set[int] = set()
    while True:
        while tell_ranks(signal.SIGTERM, told):
            time.sleep(_TELL_SECONDS)
        time.sleep(_END_SECONDS)
        if not tell_ranks(signal.SIGTERM, told):
            os._exit(Stopped.exit_code)


def exit_code(failures: Collection[ProcessFailure]) -> int:
    """Return what the first failed rank exited with; of several in one second, not the 1 of those that lost a peer.

    Torchrun ends the others by SIGTERM. So 75 is what the ranks agreed on only where no rank ended in another way.
    """
    own = [failure for failure in failures if failure.exitcode not in (Stopped.exit_code, -signal.SIGTERM)]
    if not own:
        return Stopped.exit_code
    code = min(own, key=lambda failure: (failure.exitcode < 0, failure.timestamp, failure.exitcode == 1)).exitcode
    return code if code > 0 else 128 - code


def main() -> int:
    """Run torchrun with the command line; returns the exit code."""
    # A thread, because Python runs a handler only after what it is in, such as waiting for the other nodes.
    signals, wake_up = os.pipe()
    os.set_blocking(wake_up, False)
    signal.set_wakeup_fd(wake_up)
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=pass_on, args=(signals,), daemon=True).start()
    DynamicRendezvousHandler.num_nodes_waiting = patient(DynamicRendezvousHandler.num_nodes_waiting)  # type: ignore[method-assign]
    try:
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        return exit_code(error.failures.values())
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
