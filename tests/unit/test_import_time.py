"""`import qz3_widgets` is quick and brings no torch; neither does anything that a notebook or the command loads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.unit.test_import_rules import HEAVY, LEAVES, MODULES, REPOSITORY

LIMIT_SECONDS = 0.5


def in_fresh_interpreter(code: str) -> object:
    """What ``code`` leaves in ``result``."""
    program = f"import json, sys, time\n{code}\nprint(json.dumps(result))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def libraries_after(code: str) -> set[str]:
    result = in_fresh_interpreter(f"{code}\nresult = sorted({{name.partition('.')[0] for name in sys.modules}})")
    assert isinstance(result, list)
    return set(result)


def test_the_package_brings_nothing_heavy() -> None:
    loaded = libraries_after("import qz3_widgets")
    assert "qz3_widgets" in loaded
    assert not loaded & {*HEAVY, "pandas", "numpy", "matplotlib", "pydantic", "ipywidgets", "IPython"}


def test_the_package_is_quick() -> None:
    code = "begin = time.perf_counter()\nimport qz3_widgets\nresult = time.perf_counter() - begin"
    seconds = []
    for _ in range(5):  # the quickest of several: a busy machine makes an import slower, never quicker
        took = in_fresh_interpreter(code)
        assert isinstance(took, float)
        seconds.append(took)
        if took < LIMIT_SECONDS:
            break
    assert min(seconds) < LIMIT_SECONDS


def test_every_public_name_loads_without_the_training_stack() -> None:
    loaded = libraries_after("import qz3_widgets\nfor name in qz3_widgets.__all__: getattr(qz3_widgets, name)")
    assert "pydantic" in loaded
    assert not loaded & HEAVY


def test_no_module_but_training_loads_the_training_stack() -> None:
    names = [name for name in MODULES if name and name.partition(".")[0] != "training"]
    assert len(names) > 20
    imports = "\n".join(f"import qz3_widgets.{name}" for name in names)
    code = f"{imports}\nours = [n for n in sys.modules if n.startswith('qz3_widgets.training')]\nassert not ours, ours"
    assert not libraries_after(code) & HEAVY


@pytest.mark.parametrize("leaf", [*LEAVES, "markup"])
def test_leaves_need_the_standard_library_only(leaf: str) -> None:
    before = libraries_after("")  # what the environment itself loads at every start
    extra = libraries_after(f"import qz3_widgets.{leaf}") - before
    assert extra - {"qz3_widgets"} <= set(sys.stdlib_module_names)
