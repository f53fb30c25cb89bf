"""Calls functions in teams of forked processes: torch and the rest are imported once, not by every process.

    python forked_team.py MODULE ...    imports the modules, then reads jobs from stdin, a line of JSON each

A job and its answer, another line:

    {"world": 2, "call": "toy_training:run", "kwargs": {...}, "log": "path"}  ->  [0, 0]

The answer is the processes' exit codes. All of them get SIGKILL `kill_after` seconds after `kill_from` was written (a
file; without it, after they began).
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback


def main() -> None:
    import torch

    # Before the forks: a process would take 5 s for them.
    for name in sys.argv[1:]:
        with contextlib.suppress(ModuleNotFoundError):  # where diffusers is missing, its objectives are
            importlib.import_module(name)
    # A thread pool would not survive the fork.
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        watched = job.get("kill_from")
        before = written(watched)
        children = [fork(job, rank, port) for rank in range(job["world"])]
        begin, codes = None if watched else time.monotonic(), [None] * len(children)
        while None in codes:
            if begin is None and written(watched) != before:
                begin = time.monotonic()
            late = (
                begin is not None and job.get("kill_after") is not None and time.monotonic() - begin > job["kill_after"]
            )
            for i, pid in enumerate(children):
                if codes[i] is None:
                    if late or any(codes):  # one that fails leaves the others waiting for it
                        os.kill(pid, signal.SIGKILL)
                    done, status = os.waitpid(pid, os.WNOHANG)
                    codes[i] = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.002)
        print(json.dumps(codes), flush=True)


def written(path):
    return os.stat(path).st_mtime_ns if path and os.path.exists(path) else None


def fork(job, rank, port):
    pid = os.fork()
    if pid:
        return pid
    log = os.open(f"{job['log']}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["world"] > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"]),
            "LOCAL_WORLD_SIZE": str(job["world"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    code = 1
    try:
        module, function = job["call"].split(":")
        getattr(importlib.import_module(module), function)(**job["kwargs"])
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
