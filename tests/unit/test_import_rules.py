"""Who may import whom: every import of every module is held against one table."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "qz3_widgets"
Kind = Literal["module", "function", "typing"]

HEAVY = {"accelerate", "bitsandbytes", "datasets", "deepspeed", "peft", "torch", "transformers", "trl"}
FRAMES = {"numpy", "pandas"}
# What every rank imports, and what everything else may build on.
LEAVES = ("units", "runs.layout", "trace.records")
# Pieces of HTML: as light, but for what is shown.
MARKUP = "markup"


@dataclass(frozen=True)
class Rule:
    """What the modules below ``of`` may import, besides the standard library and each other."""

    of: str
    ours: set[str] = field(default_factory=set)  # prefixes of our modules, anywhere
    theirs: set[str] = field(default_factory=set)  # libraries, anywhere
    ours_in_functions: set[str] = field(default_factory=set)
    theirs_in_functions: set[str] = field(default_factory=set)
    ours_for_types: set[str] = field(default_factory=set)  # under TYPE_CHECKING: nothing is loaded
    theirs_for_types: set[str] = field(default_factory=set)
    each_other: bool = True

    def allows_ours(self, target: str, kind: Kind) -> bool:
        allowed = self.ours | ({self.of} if self.each_other else set())
        if kind == "function":
            allowed = allowed | self.ours_in_functions
        if kind == "typing":
            allowed = allowed | self.ours_in_functions | self.ours_for_types
        return any(below(target, prefix) for prefix in allowed)

    def allows_theirs(self, library: str, kind: Kind) -> bool:
        allowed = self.theirs
        if kind == "function":
            allowed = allowed | self.theirs_in_functions
        if kind == "typing":
            allowed = allowed | self.theirs_in_functions | self.theirs_for_types
        return library in allowed


# What both the ranks and the readers of their files must know, with sizes in words.
PROBES = "trace.probes"

BASE = {*LEAVES, "config"}
VIEW = {*BASE, MARKUP, "plan", "launch", "runs", "trace", "analysis", "plotting", "demo"}

RULES = (
    # The standard library only: these run in every rank.
    *(Rule(leaf, each_other=False) for leaf in (*LEAVES, MARKUP)),
    Rule("config", ours=set(LEAVES), theirs={"pydantic", "yaml"}),
    # The machine is probed and files are looked into inside functions: a plan for an imagined machine loads none of it.
    Rule(
        "plan",
        ours={*BASE, "runs"},
        theirs_in_functions={"jinja2", "psutil", "pyarrow", "pynvml", "torch"},
    ),
    # A process of its own, which reads a model's shape from its class.
    Rule("plan.shape_reader", theirs_in_functions={"bitsandbytes", "torch", "transformers"}),
    Rule("doctor", ours={*BASE, "runs", "plan"}, theirs_in_functions={"psutil", "pyarrow", "pynvml", "torch"}),
    # It names torch, accelerate and deepspeed in an argv and imports none of them, not even inside a function.
    Rule("launch", ours={*BASE, "plan", "runs"}, theirs={"psutil", "yaml"}),
    # Reading a run's frames is a convenience of `Run`, loaded when asked for; a plan is only written down here.
    Rule(
        "runs",
        ours={*LEAVES, MARKUP},
        theirs={"psutil"},
        ours_in_functions={"config", "trace.reader"},
        ours_for_types={"plan"},
        theirs_for_types={"pandas"},
    ),
    Rule("trace", ours=set(LEAVES), theirs={*FRAMES, "pyarrow"}),
    Rule(PROBES, ours={"units"}, each_other=False),
    Rule("analysis", ours={*BASE, MARKUP, "plan", "runs", "trace"}, theirs=FRAMES),
    Rule("plotting", ours={*BASE, MARKUP, "plan", "runs", "trace", "analysis"}, theirs={*FRAMES, "matplotlib"}),
    Rule(
        "training",
        # What a rank prints goes to disk: secrets are taken out first (a module that uses the standard library only).
        ours={*BASE, "runs.files", "runs.secrets", PROBES},
        theirs={*HEAVY, "psutil", "safetensors", "tokenizers", "yaml"},
        theirs_in_functions={"gguf", "huggingface_hub"},
    ),
    Rule("widgets", ours=VIEW, theirs={*FRAMES, "IPython", "ipywidgets", "matplotlib", "traitlets"}),
    Rule("ladder", ours={*BASE, "plan", "launch", "runs", "analysis"}),
    Rule("demo", ours={*BASE, "plan", "launch", "runs"}),
    Rule("terminal", ours={*LEAVES, "runs", "analysis", "demo"}, theirs={"rich"}),
    Rule("terminal_proof", ours={*LEAVES, "analysis"}, theirs={"rich"}),
    Rule("terminal_plan", ours={*LEAVES, "ladder", "plan", "terminal"}, theirs={"rich"}),
    Rule("terminal_demo", ours={*VIEW, "terminal"}, theirs={"rich"}),
    Rule("cli_lab", ours_in_functions={"launch"}, theirs={"rich", "typer"}),
    Rule("cli_queue", ours_in_functions={"launch"}, theirs={"rich", "typer"}),
    Rule(
        "cli",
        ours={
            *VIEW,
            *("cli_lab", "cli_queue", "ladder", "widgets"),
            *("terminal", "terminal_demo", "terminal_plan", "terminal_proof"),
        },
        theirs={"click", "rich", "typer"},
    ),
    # The public names are loaded when they are asked for.
    Rule("", ours_in_functions={*VIEW, "widgets"}, each_other=False),
)
# Comes with a later piece of work; whoever adds it takes it out of here.
NOT_YET = {"doctor"}


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.") or prefix == ""


def rule_for(module: str) -> Rule | None:
    """The most specific rule. A package's own ``__init__`` that leaves pass through is held to the leaves' rule."""
    if module in {"runs", "trace"}:
        return Rule(module, each_other=False)
    if module == "":
        return next(rule for rule in RULES if rule.of == "")
    fitting = [rule for rule in RULES if rule.of and below(module, rule.of)]
    return max(fitting, key=lambda rule: len(rule.of), default=None)


def module_name(path: Path) -> str:
    """``qz3_widgets/runs/layout.py`` is ``runs.layout``; the package itself is ``""``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def all_modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


MODULES = all_modules()


@dataclass(frozen=True)
class Import:
    line: int
    kind: Kind
    name: str  # absolute, with "qz3_widgets." for ours


def imports(tree: ast.AST, module: str, *, is_package: bool, kind: Kind = "module") -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        inner = kind
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner = "function"
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for statement in node.body:
                yield from imports(ast.Module([statement], []), module, is_package=is_package, kind="typing")
            for statement in node.orelse:
                yield from imports(ast.Module([statement], []), module, is_package=is_package, kind=kind)
            continue
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, kind, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = ["qz3_widgets", *module.split(".")] if module else ["qz3_widgets"]
                up = node.level - (1 if is_package else 0)
                parts = parts[: len(parts) - up]
                source = ".".join([*parts, *source.split(".")] if source else parts)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                # `from ..runs import layout` names a module, `from ..runs.layout import RunLayout` a name in one.
                is_module = full.removeprefix("qz3_widgets.") in MODULES or source == "matplotlib"
                yield Import(node.lineno, kind, full if is_module else source)
        yield from imports(node, module, is_package=is_package, kind=inner)


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    rule = rule_for(module)
    if rule is None:
        return [f"qz3_widgets.{module}: no rule says what it may import; add one"]
    found = []
    for item in imports(ast.parse(source), module, is_package=is_package):
        library, _, rest = item.name.partition(".")
        if library == "qz3_widgets":
            # The package itself (its version) is light and everybody's.
            ok = not rest or rule.allows_ours(rest, item.kind)
        elif library in sys.stdlib_module_names:
            ok = True
        else:
            ok = rule.allows_theirs(library, item.kind) and not below(item.name, "matplotlib.pyplot")
        if not ok:
            found.append(f"qz3_widgets.{module}, line {item.line}: imports {item.name} ({item.kind} level)")
    return sorted(set(found))


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_rules(module: str) -> None:
    path = MODULES[module]
    found = violations(module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("of", sorted({rule.of for rule in RULES if rule.of} - NOT_YET))
def test_no_rule_is_vacuous(of: str) -> None:
    inside = [path for name, path in MODULES.items() if below(name, of) and path.name != "__init__.py"]
    assert inside, f"the rule for {of} holds no module"
    assert any(path.read_text(encoding="utf-8").strip() for path in inside)


@pytest.mark.parametrize("of", sorted(NOT_YET))
def test_what_is_not_there_yet_is_not_there(of: str) -> None:
    assert not [name for name in MODULES if below(name, of)], f"{of} has come: take it out of NOT_YET"


def test_no_global_plot_style() -> None:
    """A context that puts everything back is fine; a setting that stays is not."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                banned = node.attr in {"rcParams", "rcParamsDefault", "rcdefaults", "switch_backend"}
                assert not banned, f"{name}, line {node.lineno}"


FORBIDDEN = (
    ("units", "import numpy"),
    ("runs.layout", "from ..config import schema"),
    ("trace.records", "def f():\n    import pandas"),
    ("trace", "from .reader import read_memory"),
    ("config.io", "import torch"),
    ("config.io", "from ..plan.plan import Plan"),
    ("plan.capabilities", "import torch"),
    ("plan.capabilities", "if True:\n    import torch.cuda"),
    ("plan.plan", "from ..launch import process"),
    ("plan.plan", "def f():\n    import transformers"),
    ("doctor.rules", "import torch"),
    ("launch.command", "def f():\n    import torch"),
    ("launch.command", "from accelerate.commands import launch"),
    ("launch.command", "def f():\n    import deepspeed"),
    ("launch.process", "from ..analysis.memory import peaks"),
    ("runs.store", "from ..trace.reader import read_memory"),
    ("runs.store", "def f():\n    from ..launch.process import start"),
    ("training.run", "from ..runs.store import Run"),
    ("training.run", "from ..trace.reader import read_memory"),
    ("training.run", "import pandas"),
    *((folder + ".x", "def f():\n    from ..training.run import main") for folder in ("plan", "analysis", "widgets")),
    ("cli", "def f():\n    from .training import run"),
    ("", "def f():\n    from .training import run"),
    ("", "from .config.schema import RunConfig"),
    ("analysis.memory", "import matplotlib.figure"),
    ("analysis.memory", "from ..plotting.memory import plot_memory"),
    ("plotting.memory", "import matplotlib.pyplot as plt"),
    ("plotting.memory", "from matplotlib import pyplot"),
    ("plotting.memory", "import ipywidgets"),
    ("plotting.memory", "if TYPE_CHECKING:\n    from ..widgets.live import watch"),
    ("runs.store", "def f():\n    from ..widgets.live import watch"),
    ("widgets.live", "from ..cli import main"),
    ("helpers", "import os"),
)
ALLOWED = (
    ("plan.capabilities", "def f():\n    import torch"),
    ("plan.plan", "from ..runs.layout import RunLayout"),
    ("runs.store", "if TYPE_CHECKING:\n    import pandas as pd\n    from ..plan.plan import Plan"),
    ("runs.store", "def f():\n    from ..trace.reader import read_memory"),
    ("training.run", "import torch\nfrom ..config.schema import RunConfig\nfrom .. import __version__"),
    ("plotting.memory", "from matplotlib.figure import Figure"),
    ("cli", "from .widgets import live"),
    ("", "def __getattr__(name):\n    from .widgets import live"),
)


@pytest.mark.parametrize("module, source", FORBIDDEN)
def test_the_checker_finds(module: str, source: str) -> None:
    assert violations(module, source, is_package=module in {"", "trace"})


@pytest.mark.parametrize("module, source", ALLOWED)
def test_the_checker_allows(module: str, source: str) -> None:
    assert not violations(module, source, is_package=module == "")
