from __future__ import annotations

import subprocess
import sys
import threading

from qz3_widgets.widgets import background


def test_all_are_stopped_and_waited_for() -> None:
    ends = [threading.Event() for _ in range(2)]
    threads = [background.start(f"test-{number}", end.wait, stop=end.set) for number, end in enumerate(ends)]
    assert all(thread.is_alive() and thread.daemon for thread in threads)
    background.stop_all()
    assert not any(thread.is_alive() for thread in threads)


def test_the_interpreter_ends_after_them() -> None:
    code = (
        "import threading\nfrom qz3_widgets.widgets import background\nend = threading.Event()\n"
        "background.start('t', lambda: (end.wait(), print('ended', flush=True)), stop=end.set)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n"
