from __future__ import annotations

import subprocess
import sys
import textwrap
import time

from qz3_widgets.launch.tree import ProcessTree
from qz3_widgets.runs.alive import ProcessId

from .conftest import wait_for

FAMILY = """
    import subprocess, sys, time
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    print("ready", flush=True)
    time.sleep({seconds})
"""


def _family(seconds: float, prefix: str = "") -> subprocess.Popen[str]:
    code = prefix + textwrap.dedent(FAMILY.format(seconds=seconds))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    return parent


def _identity(pid: int) -> ProcessId:
    found = ProcessId.of(pid)
    assert found is not None
    return found


def test_a_child_in_a_session_of_its_own_belongs_to_the_tree() -> None:
    parent = _family(1000)
    tree = ProcessTree([_identity(parent.pid)])
    assert len(tree.living()) == 2
    begin = time.monotonic()
    assert tree.terminate(5.0) == []
    assert time.monotonic() - begin < 3.0
    assert parent.wait() == -15
    assert tree.living() == []


def test_an_orphan_stays_in_the_tree() -> None:
    parent = _family(0.5)
    tree = ProcessTree([_identity(parent.pid)])
    assert len(tree.living()) == 2
    parent.wait()
    (orphan,) = tree.living()
    assert orphan.name() == "sleep"
    assert tree.terminate(5.0) == []


def test_what_ignores_sigterm_is_killed() -> None:
    parent = _family(1000, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n")
    assert ProcessTree([_identity(parent.pid)]).terminate(0.3) == []
    assert parent.wait() == -9


def test_another_process_of_the_same_number_is_not_touched() -> None:
    other = subprocess.Popen(["sleep", "1000"])
    try:
        tree = ProcessTree([ProcessId(other.pid, _identity(other.pid).created - 60)])
        assert tree.living() == []
        assert tree.terminate(0.1) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    identity = _identity(child.pid)
    wait_for(lambda: not identity.is_alive())  # not waited for yet: a zombie
    assert child.wait() == 0
