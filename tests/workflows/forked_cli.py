"""Runs `fastlatent` commands in forked children of one process that has imported everything: 5 s saved for each.

Each line of its input is a job: {"argv": [...], "log": path, "count": 4, "kill_after": [0.3, null], "signal": 9}.
`count` children run the command at the same time; child i gets the signal after kill_after[i] seconds (null: never), or
for [pattern, bytes] as soon as the files that match hold more. "first" is code that a child runs before the command.
A line of its output: the children's exit codes, negative for a signal. Child i prints to <log>-<i>.txt.
"""

import glob
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path


def due(wait: float | list | None, seconds: float) -> bool:
    if wait is None:
        return False
    if isinstance(wait, list):
        pattern, size = wait
        return sum(os.path.getsize(path) for path in glob.glob(pattern)) > size
    return seconds > wait


def run(job: dict) -> list[int | None]:
    from fastlatent.cli import main as cli

    children = []
    for i in range(job.get("count", 1)):
        pid = os.fork()
        if pid == 0:
            log = os.open(f"{job['log']}-{i}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout.reconfigure(line_buffering=True)  # in the order of what goes to stderr
            code = 1
            try:
                exec(job.get("first", ""), {})
                code = cli(job["argv"])
            except BaseException:  # a child never goes on as this process
                traceback.print_exc()
            os._exit(code)
        children.append(pid)
    begin = time.monotonic()
    waits = job.get("kill_after") or [None] * len(children)
    codes: list[int | None] = [None] * len(children)
    killed = set()
    while None in codes:
        for i, pid in enumerate(children):
            if codes[i] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[i] = os.waitstatus_to_exitcode(status)
                elif i not in killed and due(waits[i], time.monotonic() - begin):
                    killed.add(i)
                    os.kill(pid, job.get("signal", signal.SIGKILL))
        time.sleep(0.002)
    return codes


def main() -> None:
    import fastlatent.workflows.convert
    import fastlatent.workflows.decode_experiment
    import fastlatent.workflows.encode
    import fastlatent.workflows.train_ar  # noqa: F401  # torch and diffusers, before the forks
    from fastlatent.caches.formats import FORMATS, format_of

    for name in FORMATS:
        format_of(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file: its modules are not for the commands
    assert Path(__file__).name == "forked_cli.py"
    main()
