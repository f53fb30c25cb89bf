"""Runs `fastlatent` commands in forked children of one process that has imported everything: 5 s saved for each.

    python forked_cli.py '{"argv": [...], "count": 4, "kill_after": [0.3, null], "signal": 9}' ...

Each argument is a job: `count` children run the command at the same time; child i gets the signal after kill_after[i]
seconds (null: never). Prints one line of JSON for each job: the children's exit codes, negative for a signal.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    import fastlatent.workflows.encode  # noqa: F401  # torch and diffusers, before the forks
    from fastlatent.cli import main as cli

    for number, text in enumerate(sys.argv[1:]):
        job = json.loads(text)
        children = []
        for i in range(job.get("count", 1)):
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                log = os.open(f"{job['log']}-{number}-{i}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os._exit(cli(job["argv"]))
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
                    elif i not in killed and waits[i] is not None and time.monotonic() - begin > waits[i]:
                        killed.add(i)
                        os.kill(pid, job.get("signal", signal.SIGKILL))
            time.sleep(0.002)
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file: its modules are not for the commands
    assert Path(__file__).name == "forked_cli.py"
    main()
