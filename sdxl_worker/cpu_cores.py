"""How many CPU cores this process may use, and how many threads libraries start for them. No import
of torch: it must come first."""

import math
import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
# Read when torch's, numpy's and their compilers' libraries are loaded, also in child processes.
THREADS = "OMP_NUM_THREADS"


def follow_the_quota() -> None:
    """Have libraries start as many threads as there are cores for them, unless the owner has said
    otherwise. They count the host's cores; a container is often given the time of a few of them,
    and more threads than that wait for one another.

    To be called before torch is imported.
    """
    if not os.environ.get(THREADS):
        os.environ[THREADS] = str(cores())


def cores(root: Path = ROOT) -> int:
    """Whole cores: those that this process may run on, or the container's quota of their time, if
    that is less.

    Args:
        root: where the container's own control group is, of version 1 or 2:
            https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:  # macOS
        count = os.cpu_count() or 1
    quota = _quota(root)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def _quota(root: Path) -> float | None:
    """In cores; None: none, or it cannot be read."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / name).read_text() for name in names).split()
            if int(quota) > 0 and int(period) > 0:
                return int(quota) / int(period)
        except (OSError, ValueError):  # not there; or "max", which is no number
            continue
    return None
