"""A JupyterLab for tests: no token, its application open to the page. Loopback only."""

# ruff: noqa: F821 - Jupyter hands in `c`
import os

from jupyterlab.galata import configure_jupyter_server

configure_jupyter_server(c)  # type: ignore[name-defined]
c.ServerApp.ip = "127.0.0.1"  # type: ignore[name-defined]
c.ServerApp.port = int(os.environ["QZ3_TEST_PORT"])  # type: ignore[name-defined]
c.ServerApp.port_retries = 0  # type: ignore[name-defined]
c.ServerApp.allow_root = True  # type: ignore[name-defined]
c.LabApp.news_url = None  # type: ignore[name-defined]
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"  # type: ignore[name-defined]
