"""Stands in for ``python -m accelerate.commands.launch``: starts ranks as torchrun does, in a fraction of a second.

Each rank gets a session of its own. When one fails the others get SIGTERM, 30 seconds, then SIGKILL, and the report is
torchrun's, word for word.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml


class Asked(Exception):  # noqa: N818 - no error, a signal
    pass


def main(argv: list[str]) -> int:
    assert argv[:2] == ["-m", "accelerate.commands.launch"], argv
    words = argv[2:]
    options = {}
    while words[0].startswith("--"):
        options[words[0]] = words[1]
        words = words[2:]
    settings = yaml.safe_load(Path(options["--config_file"]).read_text())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ask)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(settings["num_processes"]):
            identity = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(settings["num_processes"])}
            command = [sys.executable, "-u", *words]
            ranks.append(subprocess.Popen(command, env={**os.environ, **identity}, start_new_session=True))
        while True:
            codes = [rank.poll() for rank in ranks]
            bad = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
            if bad:
                return _fail(ranks, bad[0])
            if codes.count(0) == len(codes):
                return 0
            time.sleep(0.05)
    except Asked:
        _end(ranks)
        return 1


def _fail(ranks: list[subprocess.Popen[bytes]], first: int) -> int:
    code, pid = ranks[first].returncode, ranks[first].pid
    print(f"failed (exitcode: {code}) local_rank: {first} (pid: {pid}) of binary: {sys.executable}", flush=True)
    _end(ranks)
    print("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n" + "=" * 60)
    print("Root Cause (first observed failure):\n[0]:\n  time      : 2026-01-01_00:00:00\n  host      : here")
    print(f"  rank      : {first} (local_rank: {first})\n  exitcode  : {code} (pid: {pid})\n  error_file: <N/A>")
    return 1


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGTERM)
    deadline = time.monotonic() + float(os.environ.get("FAKE_SHUTDOWN_SECONDS", "30"))
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(rank.pid, signal.SIGKILL)


def _ask(number: int, frame: object) -> None:
    raise Asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
