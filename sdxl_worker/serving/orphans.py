"""The worker's child processes end with it, also where it is killed.

The SDK pings from a child. In a container it dies with the worker; elsewhere it would ping on, for
ever, for a worker that is gone.
"""

import multiprocessing
import os
import threading
from multiprocessing import util


def leave_no_orphans() -> None:
    """See to it that children which multiprocessing forks from now on end with this process.

    Those that are spawned, the default outside Linux, are not reached. Programs that were started
    by other means, as PyTorch's compilers are, see to themselves.
    """
    util.register_after_fork(_end_with_parent, _watch_parent)


def _watch_parent(_: object) -> None:
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101  this is a child
    # Waits on a pipe that only the parent holds open. Unlike PR_SET_PDEATHSIG it does not depend
    # on the thread that forked, and it cannot come too late.
    parent.join()
    os._exit(1)
