"""How many CPU cores this process may use, and how many threads libraries start for them. No import
of torch: it must come first."""

import math
import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
# Read when a library is loaded: torch's, numpy's in child processes, torch's compiler, whose
# threads are processes of some hundred MB, and onnxruntime. OpenCV sees the quota itself.
VARIABLES = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "ORT_INTRA_OP_NUM_THREADS")


def follow_the_quota() -> None:
    """Have libraries start as many threads as the container's quota has cores, unless the owner has
    said otherwise. They count the host's cores; a container is often given the time of a few of
    them, and more threads than that wait for one another.

    To be called before torch is imported.
    """
    if _quota(ROOT) is None:
        return  # they see by themselves which cores they may run on
    for name in VARIABLES:
        if not os.environ.get(name):
            os.environ[name] = str(cores(ROOT))


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
