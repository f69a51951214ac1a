"""`make image-test`: builds the image on this machine, without a Docker daemon, and tries it out.

The image is built with buildah and run with podman, both from Debian's packages. What they store is
in a temporary folder, which is deleted at the end, with all mounts and containers. Where the base
image cannot be pulled, debootstrap makes one like it. The image holds the miniature model. pip is
configured as on this machine: the image has torch's CPU build where pip takes that here.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from local_endpoint.local import LocalEndpoint
from local_endpoint.queue import Rules
from shapes.judge import judge

REPOSITORY = Path(__file__).resolve().parent.parent
TOOLS = ("buildah", "podman", "runc", "debootstrap")
CONTROLNETS = REPOSITORY / "models" / "controlnets"
DISK_NEEDED_BYTES = 6 * 10**9  # twice the largest that was seen
IMAGE = "localhost/sdxl-worker:test"
STAND_IN_BASE = "localhost/python-base:bookworm"
# What the official image has, too; python3-dev holds the headers.
STAND_IN_PACKAGES = "ca-certificates,python3,python3-dev,python3-venv"
IN_APP = {"LICENSE", "__pycache__", "handler.py", "output", "sdxl_worker", "start.sh"} | {
    "requirements-control.lock",
    "requirements-torch.lock",
    "requirements.lock",
    "test_input.json",
}
WORKER_UID = 10001
PROMPT = json.loads((REPOSITORY / "test_input.json").read_text())["input"]["prompt"]
# It takes some seconds on any machine, so that the worker can be told to stop during it.
LONG_JOB = {"prompt": PROMPT, "num_images": 4, "refiner_inference_steps": 0}
# Threads of small networks wait for each other where other work is going on.
ONE_THREAD = "--env=OMP_NUM_THREADS=1"

ASK_SERVER = """
import sys, time, urllib.request
body = sys.stdin.buffer.read()
for _ in range(240):
    try:
        request = urllib.request.Request(
            "http://localhost:8000/runsync", body, {"Content-Type": "application/json"})
        print(urllib.request.urlopen(request, timeout=120).read().decode())
        break
    except ConnectionRefusedError: time.sleep(0.5)
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ConnectionRefusedError): raise
        time.sleep(0.5)
else: sys.exit("the server does not listen")
"""
# As a load balancer does it: a job once /ping says 200.
ASK_HTTP = """
import sys, time, urllib.error, urllib.request
for _ in range(240):
    try:
        if urllib.request.urlopen("http://localhost:8000/ping").status == 200: break
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ConnectionRefusedError): raise
    time.sleep(0.5)
else: sys.exit("/ping never says 200")
request = urllib.request.Request("http://localhost:8000/generate", sys.stdin.buffer.read())
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""
COMPILE = """
import torch
f = torch.compile(lambda x: torch.sin(x) * 2 + 1)
x = torch.linspace(0, 1, 1000)
torch.testing.assert_close(f(x), torch.sin(x) * 2 + 1)
from torch._dynamo.utils import counters
assert counters["stats"]["unique_graphs"] == 1, counters
"""
# Of each process that runs the handler: its user (four ids), and whether that one is final.
WORKER_USERS = """
import pathlib, re
for process in pathlib.Path("/proc").glob("[0-9]*"):
    if b"/app/handler.py" in (process / "cmdline").read_bytes().split(b"\\0"):
        status = (process / "status").read_text()
        print(*re.search(r"Uid:(.*)\\n(?:.*\\n)*NoNewPrivs:(.*)", status).group(1, 2))
"""
# The libraries of requirements-control.txt, but spandrel, whose import the worker has to help.
IMPORT_MAP_MAKERS = "import cv2, einops, onnxruntime, rtmlib"
BIND_PORT_80 = "import socket; socket.socket().bind(('', 80))"


class ImageTestError(Exception):
    """A part of the test failed. The message says which command, and what it printed last."""


def main() -> int:
    """Run the test and return the exit status: 0 also where it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m tools.image_test", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the image and its folder")
    keep = parser.parse_args().keep

    if reason := why_not():
        print(f"skipped: {reason}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    try:
        with containers(keep) as work_dir:
            build(work_dir)
            try_out(work_dir)
            print_sizes()
    except ImageTestError as error:
        print(f"FAILED after {time.monotonic() - started:.0f} s\n{error}")
        return 1
    print(f"passed in {time.monotonic() - started:.0f} s")
    return 0


def why_not() -> str | None:
    """Why the test cannot run on this machine; None where it can."""
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing and shutil.which("apt-get") is None:
        return f"needs {', '.join(missing)}"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        return "needs the right to mount"
    if shutil.disk_usage("/var/tmp").free < DISK_NEEDED_BYTES:
        return f"needs {DISK_NEEDED_BYTES / 1e9:.0f} GB in /var/tmp"
    return None


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    print(f"{name} ... ", end="", flush=True)
    started = time.monotonic()
    yield
    print(f"{time.monotonic() - started:.1f} s")


def run(command: Sequence[str], *, seconds: float, standard_input: str = "") -> str:
    """Run a command, with all it starts, and return what it writes to standard output.

    Raises:
        ImageTestError: it failed, or took longer than `seconds`.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(standard_input, timeout=seconds)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        errors += f"\n(not done after {seconds:.0f} s)"
    if process.returncode != 0:
        lines = "\n".join((output + errors).splitlines()[-40:])
        raise ImageTestError(f"{' '.join(command)}\nexit status {process.returncode}\n{lines}")
    return output


def expect(truth: object, complaint: str) -> None:
    if not truth:
        raise ImageTestError(complaint)


@contextlib.contextmanager
def containers(keep: bool) -> Iterator[Path]:
    """Make the tools store everything in one folder, which is yielded and deleted at the end."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        with step(f"install {', '.join(missing)}, which stay on this machine"):
            run(["apt-get", "update"], seconds=120)
            apt = [
                "apt-get",
                "--option=DPkg::Lock::Timeout=120",
                "--yes",
                "--no-install-recommends",
            ]
            run(["env", "DEBIAN_FRONTEND=noninteractive", *apt, "install", *missing], seconds=300)

    work_dir = Path(tempfile.mkdtemp(prefix="image-test-", dir="/var/tmp"))
    (work_dir / "tmp").mkdir()
    (work_dir / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{work_dir}/storage"\n'
        f'runroot = "{work_dir}/run"\n'
    )
    # crun refuses machines that have both kinds of cgroups.
    (work_dir / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n'
        f'[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
        f'lock_type = "file"\ntmp_dir = "{work_dir}/libpod-tmp"\n'
    )
    os.environ["CONTAINERS_STORAGE_CONF"] = str(work_dir / "storage.conf")
    os.environ["CONTAINERS_CONF"] = str(work_dir / "containers.conf")
    os.environ["TMPDIR"] = str(work_dir / "tmp")
    try:
        yield work_dir
    finally:
        with contextlib.suppress(ImageTestError):
            run(["podman", "rm", "--all", "--force", "--time", "0"], seconds=60)
        if keep:
            names = ("CONTAINERS_STORAGE_CONF", "CONTAINERS_CONF")
            print("kept:", *(f"{name}={os.environ[name]}" for name in names), f"podman run {IMAGE}")
        else:
            unmount_below(work_dir)
            shutil.rmtree(work_dir)


def unmount_below(folder: Path) -> None:
    """Builds that were killed leave mounts, and deleting through one could delete elsewhere."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in reversed(mounts):
        if Path(mount).is_relative_to(folder):
            run(["umount", "--lazy", mount], seconds=30)


def build(work_dir: Path) -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    [base] = re.findall(r"^FROM (.+) AS official$", dockerfile, re.MULTILINE)
    with step(f"pull {base}"):
        try:
            run(["buildah", "pull", "--quiet", base], seconds=300)
        except ImageTestError:
            print("not possible: a stand-in is made; ", end="")
            base = STAND_IN_BASE
    if base == STAND_IN_BASE:
        make_stand_in(work_dir / "base")
    with step("build MODEL=shapes"):
        # With a time limit: two locked cache mounts would make buildah wait for ever.
        command = ["buildah", "build", "--isolation=chroot", "--network=host", "--format=docker"]
        command += ["--layers", "--pull-never", "--ulimit=nofile=4096:4096"]
        command += ["--ulimit=nproc=4096:4096", f"--build-arg=BASE_IMAGE={base}"]
        command += ["--build-arg=MODEL=shapes", f"--tag={IMAGE}", *pip_mounts(work_dir)]
        run([*command, str(REPOSITORY)], seconds=1800)


def make_stand_in(root: Path) -> None:
    """A base image from Debian's packages; it says nothing about CUDA."""
    with step("debootstrap"):
        command = ["debootstrap", "--variant=minbase", f"--include={STAND_IN_PACKAGES}", "bookworm"]
        run([*command, str(root)], seconds=600)
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / folder)
        # As in the official images, apt keeps no packages.
        (root / "etc/apt/apt.conf.d/docker-clean").write_text(
            'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin"; };\n'
            'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";\n'
        )
    with step("import"):
        run(["tar", "-C", str(root), "--numeric-owner", "-cf", f"{root}.tar", "."], seconds=120)
        change = "--change=ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        run(["podman", "import", "--quiet", change, f"{root}.tar", STAND_IN_BASE], seconds=120)
        shutil.rmtree(root)
        Path(f"{root}.tar").unlink()


def pip_mounts(work_dir: Path) -> list[str]:
    """The build's pip gets this machine's certificates, indexes and folders of wheels.

    Where there is a second index, torch comes without the lock, and without CUDA if pip finds such
    a build. The mounts leave an empty /etc/pip.conf in the image, and empty folders.
    """
    config = {"cert": "/run/host-certificates/ca-certificates.crt"}
    mounts = {"/etc/ssl/certs": "/run/host-certificates"}
    listed = run([sys.executable, "-m", "pip", "config", "list"], seconds=60)
    for name, value in re.findall(r"^[^.]+\.\.?([\w-]+)='(.*)'$", listed, re.MULTILINE):
        if name in ("find-links", "index-url", "extra-index-url"):
            config[name] = value.replace("\\n", " ")
            for place in config[name].split():
                folder = Path(place.removeprefix("file://"))
                if folder.is_dir():
                    # An index of files has its wheels beside it.
                    folder = folder.parent if folder.name == "simple" else folder
                    mounts[str(folder)] = str(folder)
    path = work_dir / "pip.conf"
    path.write_text("\n".join(["[global]", *(f"{key} = {config[key]}" for key in config)]) + "\n")
    mounts[str(path)] = "/etc/pip.conf"
    options = [f"--volume={source}:{target}:ro" for source, target in mounts.items()]
    if second := config.get("extra-index-url"):
        options.append(f"--build-arg=PIP_EXTRA_INDEX_URL={second}")
    return options


def try_out(work_dir: Path) -> None:
    with step("configuration"):
        check_configuration()
    with step("start a container without a network"):
        command = ["podman", "run", "--detach", "--name=lab", "--network=none", ONE_THREAD, IMAGE]
        run([*command, "sleep", "infinity"], seconds=60)
    with step("--test_input, as root"):
        inside("python", "-u", "/app/handler.py", "--test_input")
        expect_picture(json.loads(inside("cat", "/app/output/output.json"))["output"])
    with step("--rp_serve_api: a picture, a check, the user, port 80"):
        server = "exec sh /app/start.sh --rp_serve_api >/tmp/server.log 2>&1"
        run(["podman", "exec", "--detach", "lab", "sh", "-c", server], seconds=60)
        drawn = ask_server({"prompt": PROMPT, "seed": 7})
        expect_picture(drawn)
        # Its decoder is a program of its own, run by the same user.
        expect_picture(ask_server({"prompt": PROMPT, "image_url": drawn["image_url"]}))
        users = {tuple(line.split()) for line in inside("python", "-c", WORKER_USERS).splitlines()}
        expect(
            users == {(*[str(WORKER_UID)] * 4, "1")},
            f"the users of the worker, and NoNewPrivs: {users}",
        )
        report = ask_server({"check": True})
        expect(report["model"] == "shapes", f"the check reports {report}")
        expect(len(json.dumps(report)) < 2000, f"the report is long: {report}")
        inside("python", "-c", BIND_PORT_80)
    with step("controlnet: a map by OpenCV, the miniature's ControlNet on a volume"):
        check_control(drawn["image_url"])
    with step("the start command of 2.1.0, --test_input"):
        command = ["podman", "run", "--rm", "--network=none", ONE_THREAD, IMAGE, "sh", "-c"]
        job = "python -u /handler.py --test_input 2>&1; stat -c 'owner %u' output/output.json"
        told = run([*command, job], seconds=180)
        expect("Saved output/" in told and f"owner {WORKER_UID}" in told, told)
    with step("HTTP, without arguments and variables: 8000, /ping, a picture, SIGTERM"):
        check_http()
    with step("torch.compile"):
        inside("python", "-c", COMPILE, seconds=300)
    with step("contents"):
        check_contents()
    with step("volumes that belong to root"):
        check_volumes(work_dir)
    with step("apt-get update"):
        command = ["podman", "run", "--rm", "--network=host", IMAGE, "apt-get", "update"]
        run(command, seconds=120)
    with step("SIGTERM while the worker starts"):
        check_early_stop()
    with step("a worker of the local endpoint: jobs, SIGTERM during one"):
        check_worker()


def inside(*command: str, seconds: float = 180, standard_input: str = "") -> str:
    """What a command prints in the container."""
    return run(
        ["podman", "exec", "--interactive", "lab", *command],
        seconds=seconds,
        standard_input=standard_input,
    )


def ask_server(job_input: dict[str, Any]) -> dict[str, Any]:
    body = json.dumps({"input": job_input})
    answer = json.loads(inside("python", "-c", ASK_SERVER, standard_input=body))
    expect(answer.get("status") == "COMPLETED", f"the server answers {str(answer)[:1000]}")
    return dict(answer["output"])


def expect_picture(output: dict[str, Any]) -> None:
    expect(output.get("images"), f"no picture: {str(output)[:1000]}")
    for data_uri in output["images"]:
        picture = Image.open(io.BytesIO(base64.b64decode(data_uri.partition(",")[2])))
        seen = judge(picture)
        expect(seen.matches(PROMPT), f"the picture shows {seen}")


def check_configuration() -> None:
    """What the platform, and the Hub's tests, rely on."""
    [image] = json.loads(run(["podman", "image", "inspect", IMAGE], seconds=60))
    config = image["Config"]
    expect(config["Cmd"] == ["sh", "/app/start.sh"], f"CMD is {config['Cmd']}")
    for absent in ("Entrypoint", "ExposedPorts"):
        expect(not config.get(absent), f"{absent} is {config.get(absent)}")
    expect(image.get("User", "") in ("", "root"), f"the user is {image.get('User')}")
    expect(config["WorkingDir"] == "/app", f"WORKDIR is {config['WorkingDir']}")
    variables = dict(pair.split("=", 1) for pair in config["Env"])
    expected = {"MODEL_DIR": "/models/shapes", "HF_HUB_OFFLINE": "1", "RUNPOD_LOG_LEVEL": "INFO"}
    expect(expected.items() <= variables.items(), f"the environment is {variables}")
    told = json.dumps([variables, image["History"]]).lower()
    expect(not re.search(r"hf_[a-z]{10}|password|pip_index_url=|://[^/ ]*@", told), told)


def check_contents() -> None:
    """Nothing is there that does not belong, and nothing had to be compiled at run time."""
    seen = set(inside("ls", "-A", "/app").split())
    expect(seen == IN_APP, f"/app holds {seen}")
    expect(inside("ls", "/models").split() == ["shapes"], "there are other models")
    expect(inside("id", "-u").strip() == "0", "the user is not root")
    places = ("/etc/pip.conf", "/root", "/run", "/var/cache/apt", "/var/lib/apt/lists")
    strays = inside("find", *places, "-type", "f", "-size", "+0", "-not", "-name", ".*")
    expect(not strays, f"left over: {strays}")
    inside("sh", "-c", "ls /app/__pycache__/handler.*.pyc")
    changed = run(["podman", "diff", "lab"], seconds=60).splitlines()
    written = [line for line in changed if line.endswith(".pyc") and " /tmp/" not in line]
    expect(not written, f"compiled only at run time: {written}")


def check_volumes(work_dir: Path) -> None:
    """A worker that is not root reads the models there, and keeps what it compiled."""
    for name in ("models", "cache"):
        (work_dir / name).mkdir(mode=0o755)
    run(["podman", "cp", "lab:/models/shapes", str(work_dir / "models")], seconds=60)
    command = ["podman", "run", "--rm", "--network=none", ONE_THREAD, "--env=COMPILE=blocks"]
    command += [f"--volume={work_dir}/models:/volume:ro", "--env=MODEL_DIR=/volume/shapes"]
    command += [f"--volume={work_dir}/cache:/runpod-volume"]
    command += ["--env=COMPILE_CACHE_DIR=/runpod-volume/compiled"]
    command += ["--env=LORA_CACHE_DIR=/runpod-volume/lora-cache", IMAGE, "sh", "-c"]
    local_job = "sh /app/start.sh --test_input 2>&1; stat -c 'owner %u' output/output.json"

    def log() -> str:
        told = run([*command, local_job], seconds=600)
        expect("Saved output/" in told, f"no picture:\n{told}")
        return told

    told = log()
    expect(f"owner {WORKER_UID}" in told and "WARNING" not in told, told)
    expect("kept what was compiled in /runpod-volume/compiled/" in told, told)
    kept = [*(work_dir / "cache/compiled").iterdir()]
    expect([path.stat().st_uid for path in kept] == [WORKER_UID], f"kept: {kept}")
    downloads = (work_dir / "cache/lora-cache").stat().st_uid
    expect(downloads == WORKER_UID, f"LORA_CACHE_DIR belongs to {downloads}")
    told = log()
    expect("took what was compiled from /runpod-volume/compiled/" in told, told)

    (work_dir / "models/shapes").chmod(0o700)
    told = log()
    expect("owner 0" in told and "the worker runs as root: only root can read /vol" in told, told)


def check_control(image_url: str) -> None:
    inside("python", "-c", IMPORT_MAP_MAKERS)
    control = [{"type": "canny", "image_url": image_url}]
    job = {"prompt": PROMPT, "controlnet": control, "return_maps": True}
    command = ["podman", "run", "--rm", "--network=none", ONE_THREAD]
    command += [f"--volume={CONTROLNETS}:/volume/controlnets:ro"]
    command += ["--env=CONTROLNET_DIR=/volume/controlnets", IMAGE, "sh", "-c"]
    local_job = 'sh /app/start.sh --test_input "$0" >&2; cat output/output.json'
    told = run([*command, local_job, json.dumps({"input": job})], seconds=180)
    output = json.loads(told)["output"]
    expect_picture(output)
    expect(len(output.get("maps", [])) == 1, f"no map: {str(output)[:1000]}")


def check_early_stop() -> None:
    """The worker ends at once, though process 1 of a container ignores unhandled signals."""
    queue = "--env=RUNPOD_WEBHOOK_GET_JOB=http://127.0.0.1:9/"
    run(["podman", "run", "--detach", "--name=early", "--network=none", queue, IMAGE], seconds=60)
    for _ in range(200):
        with contextlib.suppress(ImageTestError):  # it has ended meanwhile
            run(["podman", "kill", "--signal=TERM", "early"], seconds=60)
        [state] = json.loads(run(["podman", "inspect", "early"], seconds=60))
        if not state["State"]["Running"]:
            break
        time.sleep(0.2)
    exit_status = state["State"]["ExitCode"]
    expect(exit_status == 128 + signal.SIGTERM, f"exit status {exit_status}")


def check_http() -> None:
    """`docker run IMAGE` serves, and ends by itself when it is told to."""
    run(
        ["podman", "run", "--detach", "--name=http", "--network=none", ONE_THREAD, IMAGE],
        seconds=60,
    )
    ask = ["podman", "exec", "--interactive", "http", "python", "-c", ASK_HTTP]
    body = json.dumps({"prompt": PROMPT, "seed": 7})
    expect_picture(json.loads(run(ask, seconds=300, standard_input=body)))
    run(["podman", "stop", "--time=60", "http"], seconds=120)
    [state] = json.loads(run(["podman", "inspect", "http"], seconds=60))
    exit_status = state["State"]["ExitCode"]
    expect(exit_status == 0, f"exit status {exit_status}")


def check_worker() -> None:
    """The default CMD takes jobs; a SIGTERM lets it finish and deliver the one at hand."""
    with socket.socket() as probe:
        port_80_is_ours = probe.connect_ex(("127.0.0.1", 80)) != 0
    command = ["podman", "run", "--rm", "--network=host", "--env=RUNPOD_*", ONE_THREAD, IMAGE]
    # A worker that ends waits for the answers to its polls.
    with LocalEndpoint(worker_command=command, rules=Rules(poll_seconds=5)) as endpoint:
        answer = endpoint.wait(endpoint.run({"prompt": PROMPT, "seed": 7}), timeout_seconds=120)
        expect(answer["status"] == "COMPLETED", f"a job ended as {answer}")
        expect_picture(answer["output"])
        if port_80_is_ours:
            with socket.socket() as probe:
                expect(probe.connect_ex(("127.0.0.1", 80)) != 0, "the worker listens on port 80")

        [worker] = endpoint.workers
        job_id = endpoint.run(LONG_JOB)
        while not endpoint.record.posts_of(job_id, "progress"):
            expect(worker.exit_status is None, worker.log())
            time.sleep(0.05)
        worker.terminate()
        answer = endpoint.wait(job_id, timeout_seconds=180)
        expect(answer["status"] == "COMPLETED", f"the job at SIGTERM ended as {answer}")
        expect(len(answer["output"]["images"]) == 4, "the job at SIGTERM lost pictures")
        deadline = time.monotonic() + 60
        while worker.exit_status is None:
            expect(time.monotonic() < deadline, f"no end after SIGTERM:\n{worker.log()}")
            time.sleep(0.05)
        expect(worker.exit_status == 0, f"exit status {worker.exit_status}:\n{worker.log()}")


def print_sizes() -> None:
    history = json.loads(run(["podman", "history", "--format=json", IMAGE], seconds=60))
    print("layers, the oldest first:")
    for layer in reversed(history):
        if layer["size"] > 0:
            made_by = re.sub(r"^/bin/sh -c (#\(nop\) )?", "", layer["CreatedBy"])
            print(f"{layer['size'] / 1e6:9.2f} MB  {made_by[:90]}")
    print(f"{sum(layer['size'] for layer in history) / 1e6:9.2f} MB  in all")


if __name__ == "__main__":
    sys.exit(main())
