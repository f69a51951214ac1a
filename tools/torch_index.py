"""Prints pip's option for torch's index of CPU builds, where those are the right ones.

On Linux the usual index's torch brings CUDA's libraries, which are gigabytes, and of no use without
an NVIDIA GPU. `make run` asks before anything is installed, so this needs no other library:

    python -m tools.torch_index https://download.pytorch.org/whl/cpu
"""

import platform
import queue
import sys
import threading
import urllib.request

from sdxl_worker.gpu import gpu_is_there

PATIENCE_S = 4.0


def choose(index: str, system: str, gpu: bool) -> tuple[str, str]:
    """The option for pip, or nothing, and why."""
    if system != "Linux":
        return "", f"from the usual index, whose builds for {system} are without CUDA"
    if gpu:
        return "", "from the usual index, with CUDA, for there is an NVIDIA GPU"
    problem = ask(index)
    if problem:
        return "", (
            "from the usual index, perhaps with CUDA's libraries: there is no NVIDIA GPU, "
            f"but {index} does not answer ({problem})"
        )
    # An extra index is enough: 2.13.0+cpu satisfies torch==2.13.0 and is newer than 2.13.0. Where
    # that index lacks a build for this Python, pip still takes the usual one.
    return f"--extra-index-url {index}", f"the CPU build, for there is no NVIDIA GPU ({index})"


def ask(index: str) -> str:
    """What is wrong with the index; nothing if it answers in time."""
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def open_page() -> None:
        page = f"{index}/torch/"
        try:
            urllib.request.urlopen(page, timeout=PATIENCE_S).close()  # noqa: S310 the caller's own
        except Exception as error:
            answers.put(str(error) or type(error).__name__)
        else:
            answers.put("")

    # urlopen's timeout is for each read, and name resolution has none. A daemon thread may be left.
    threading.Thread(target=open_page, daemon=True).start()
    try:
        return answers.get(timeout=PATIENCE_S)
    except queue.Empty:
        return f"no answer in {PATIENCE_S:.0f} s"


def main() -> None:
    option, reason = choose(sys.argv[1], platform.system(), gpu_is_there())
    print(f"torch: {reason}", file=sys.stderr)
    print(option)


if __name__ == "__main__":
    main()
