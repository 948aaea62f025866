"""Who is to blame, from what the launcher's log and the traces say."""

from __future__ import annotations

from pathlib import Path

import pytest

from qz3_widgets.launch.verdict import DISK_FULL, AttemptEnd, judge
from qz3_widgets.launch.watch import LauncherLog, RankExit
from qz3_widgets.runs.alive import ProcessId
from qz3_widgets.runs.ranks import Death, RankTrace
from qz3_widgets.runs.status import Status

RUNNING = Status(run_id="r", state="running", created="2026-01-01T00:00:00+00:00", num_ranks=2)
# Both ranks had ended when torchrun looked: rank 0 because it lost its peer, rank 1 by a SIGKILL.
BOTH_AT_ONCE = """\
E1124 12:39:03.508000 750 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 0 \
(pid: 769) of binary: /usr/bin/python
train_qlora.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-24_12:39:03
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 770)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 770
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_12:39:03
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 769)
  error_file: <N/A>
"""


def _log(folder: Path, text: str) -> LauncherLog:
    log = LauncherLog(folder / "launcher.log")
    (folder / "launcher.log").write_text(text)
    return log


def _trace(rank: int, outcome: str | None, error: str | None = None) -> RankTrace:
    return RankTrace(rank, 2, "here", ProcessId(769 + rank, 1.0), 1.0, 2.0, outcome, error)  # type: ignore[arg-type]


def _end(death: Death | None, *traces: RankTrace, exit_code: int = 1, disk_was_full: bool = False) -> AttemptEnd:
    process = None if death is None else ProcessId(769 + death.rank, 1.0)
    return AttemptEnd(exit_code, False, death, process, traces, disk_was_full=disk_was_full)


def test_every_rank_in_the_launchers_report_is_known(tmp_path: Path) -> None:
    log = _log(tmp_path, BOTH_AT_ONCE)
    assert log.exit_of(770) == RankExit(1, 770, -9)
    assert log.exit_of(769) == RankExit(None, 769, 1)
    assert log.exit_of(771) is None
    assert log.root_cause() == RankExit(0, 769, 1)


def test_a_killed_rank_is_told_from_the_one_that_lost_its_peer(tmp_path: Path) -> None:
    end = _end(Death(1, 2.0, None), _trace(0, "failed", "RuntimeError: connection reset"), _trace(1, None))
    status = judge(RUNNING, end, _log(tmp_path, BOTH_AT_ONCE))
    assert (status.state, status.failed_rank, status.signal) == ("failed", 1, "SIGKILL")
    assert status.error is not None
    assert status.error.startswith("killed by SIGKILL")


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_full_disk_is_the_reason_of_silence(tmp_path: Path, exit_code: int) -> None:
    end = _end(Death(1, 2.0, None), _trace(0, None), _trace(1, None), exit_code=exit_code, disk_was_full=True)
    status = judge(RUNNING, end, _log(tmp_path, ""))
    assert status.state == "failed"
    assert status.error is not None
    assert status.error.startswith(DISK_FULL)


def test_a_rank_that_names_the_full_disk_is_told_which(tmp_path: Path) -> None:
    error = "OSError: [Errno 28] No space left on device"
    end = _end(Death(1, 2.0, error), _trace(0, None), _trace(1, "failed", error), disk_was_full=True)
    assert judge(RUNNING, end, _log(tmp_path, "")).error == f"{DISK_FULL} ({error})"


def test_a_full_disk_elsewhere_is_not_the_runs(tmp_path: Path) -> None:
    error = "OSError: [Errno 28] No space left on device"
    end = _end(Death(1, 2.0, error), _trace(0, None), _trace(1, "failed", error))
    assert judge(RUNNING, end, _log(tmp_path, "")).error == error


def test_a_full_disk_is_no_reason_to_call_a_good_run_bad(tmp_path: Path) -> None:
    end = _end(None, _trace(0, "succeeded"), _trace(1, "succeeded"), exit_code=0, disk_was_full=True)
    status = judge(RUNNING, end, _log(tmp_path, ""))
    assert (status.state, status.error) == ("succeeded", None)
