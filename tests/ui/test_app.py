"""``qz3 app``: the workbench alone as a page, which asks no other server for anything."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.conftest import REPOSITORY
from tests.fake_runs import make_run

pytestmark = pytest.mark.ui


def test_the_page_is_the_workbench_and_asks_nobody_else(page: Page, tmp_path: Path) -> None:
    runs_dir = tmp_path / "my runs"
    make_run(runs_dir, run_id="served-r2-20260917-121314", num_steps=4)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from qz3_widgets.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "app", "--no-browser", "--port", str(port), "--runs-dir", str(runs_dir)]
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    answered: list[str] = []
    errors: list[str] = []
    page.on("requestfinished", lambda request: answered.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(
        [*command, "--ip", "127.0.0.1"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    ) as server:  # fmt: skip
        try:
            address = wait_until_up(page, server, f"http://127.0.0.1:{port}/", tmp_path / "log")
            page.goto(address)
            assert "/login" in page.url  # without the token nobody gets in
            page.goto(with_token(address, tmp_path / "log"))
            expect(page.locator(".qz3-workbench")).to_be_visible(timeout=120_000)
            page.locator(".qz3-workbench > .jupyter-widget-tab > .lm-TabBar .lm-TabBar-tab", has_text="Monitor").click()
            expect(page.locator(".qz3-monitor .qz3-live-head")).to_contain_text("served-r2-20260917-121314")
            expect(page.locator(".qz3-monitor .qz3-live-memory svg.qz3-svg")).to_be_visible()
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)
    elsewhere = [url for url in answered if not url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:"))]
    assert elsewhere == []
    assert errors == []


def wait_until_up(page: Page, server: subprocess.Popen[bytes], url: str, log: Path) -> str:
    """Returns ``url`` as soon as the server answers there."""
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=120).close()
            return url
        except (urllib.error.URLError, OSError):
            page.wait_for_timeout(100)  # the server can't tell when it is there
    raise RuntimeError(f"qz3 app did not start:\n{log.read_text(errors='replace')[-3000:]}")


def with_token(url: str, log: Path) -> str:
    """The address as the server has printed it."""
    found = re.search(re.escape(url) + r"\?token=\w+", log.read_text(errors="replace"))
    assert found is not None
    return found.group()
