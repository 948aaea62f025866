"""A plan: a configuration that was checked against a machine. What starts a run takes a plan and nothing else."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

from ..config.changes import with_changes
from ..config.schema import RunConfig
from ..config.strategy import resolve_load_strategy
from ..units import format_bytes
from .capabilities import Capabilities, detect
from .context import Context, Device
from .inputs import inspect_inputs
from .issue import Issue
from .rules import check

_GLYPHS = {"error": "✕", "warning": "!", "info": "i"}


class PlanError(ValueError):
    """A plan that can't be started. :attr:`issues` holds what blocks it."""

    def __init__(self, issues: Iterable[Issue]) -> None:
        """The message has a line for each issue: ``field: message (fix: ...)``."""
        self.issues = tuple(issues)
        super().__init__("\n".join(str(issue) for issue in self.issues))


@dataclass(frozen=True)
class Rehearsal:
    """Which rank of how many one process plays; see :func:`~qz3_widgets.plan.rehearsal.make_rehearsal`."""

    rank: int
    world_size: int
    arithmetic: bool = True  # False: products of matrices are allocated, not computed

    def __str__(self) -> str:
        without = "" if self.arithmetic else ", without arithmetic"
        return f"rank {self.rank} of {self.world_size}{without}"


@dataclass(frozen=True)
class Plan:
    """What will be run where, and everything that was found out about it beforehand."""

    config: RunConfig
    capabilities: Capabilities
    issues: tuple[Issue, ...]  # the worst first
    device: Device
    world_size: int  # ranks over all machines
    local_ranks: int  # ranks on this machine
    deepspeed: bool  # False: plain data parallel, without DeepSpeed
    threads_per_rank: int
    created: str  # ISO 8601, UTC
    rehearsal: Rehearsal | None = None  # one process plays one rank of world_size
    picture: ClassVar[Callable[[Plan], str] | None] = None
    """What draws a plan in a notebook, as HTML; the package's top sets it, for a plan knows nothing of figures."""

    @property
    def errors(self) -> tuple[Issue, ...]:
        """The issues that block the start."""
        return tuple(issue for issue in self.issues if issue.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether nothing blocks the start."""
        return not self.errors

    @property
    def device_capacity_bytes(self) -> int | None:
        """Memory of the device that a rank runs on: the smallest GPU, or the host; ``None`` if not known."""
        machine = self.capabilities
        return machine.gpu_memory_bytes if self.device == "cuda" else machine.host_memory_bytes

    @property
    def strategy(self) -> str:
        """How the model is spread: ``zero3``, ``zero2``, ``zero1``, ``data_parallel`` or ``device_map``."""
        if self.deepspeed:
            return f"zero{self.config.zero.zero_stage}"
        return "device_map" if resolve_load_strategy(self.config) == "device_map" else "data_parallel"

    def raise_if_blocked(self) -> None:
        """Do nothing if the plan can be started here.

        Raises:
            PlanError: an error stands, or the plan is for GPUs that were only imagined.
        """
        blocking = list(self.errors)
        if self.capabilities.imagined and self.device == "cuda":
            message = "the plan was made for imagined GPUs; plan again on the machine that runs it"
            blocking.append(Issue("imagined-machine", "error", "launch.device", message))
        if blocking:
            raise PlanError(blocking)

    def fixed(self) -> RunConfig:
        """The configuration with the fixes of all errors and warnings applied, again until no fix is left.

        Where two fixes want the same field, the worse issue has it. What only the user can mend stays.
        """
        plan = self
        # A fix can uncover an issue that it hid, and the longest such chain is short; a limit all the same.
        for _ in range(8):
            changes: dict[str, Any] = {}
            for issue in plan.issues:
                if issue.severity != "info" and issue.fix and not changes.keys() & issue.fix.keys():
                    changes.update(issue.fix)
            config = with_changes(plan.config, changes, source="fixes")
            if config == plan.config:
                break
            plan = make_plan(config, self.capabilities)
        return plan.config

    def to_json(self) -> dict[str, Any]:
        """Plain values: what ``plan.json`` holds."""
        return {
            "world_size": self.world_size,
            "local_ranks": self.local_ranks,
            "device": self.device,
            "device_capacity_bytes": self.device_capacity_bytes,
            "strategy": self.strategy,
            "load_strategy": resolve_load_strategy(self.config),
            "deepspeed": self.deepspeed,
            "threads_per_rank": self.threads_per_rank,
            "created": self.created,
            "rehearsal": None if self.rehearsal is None else asdict(self.rehearsal),
            "machine": self.capabilities.to_json(),
            "expected": self._expected(),
            "issues": [issue.to_json() for issue in self.issues],
        }

    def _expected(self) -> dict[str, Any] | None:
        """What each rank's memory will be, where the model's shape is at hand; see :mod:`.expectation`."""
        from .expectation import expect

        return expect(self)

    def describe_machine(self) -> str:
        """Where it runs, in words: ``"2 ranks on 2 x 24.0 GiB"``."""
        ranks = f"{self.world_size} rank{'s' if self.world_size != 1 else ''}"
        if self.rehearsal is not None:
            ranks = f"rehearsal: {self.rehearsal}"
        gpus = self.capabilities.usable_gpus
        if self.device == "cuda":
            here = (
                f"{len(gpus)} x {format_bytes(self.device_capacity_bytes)} GPU" if gpus else "GPUs that are not there"
            )
        else:
            here = f"the CPU ({self.capabilities.num_cpus} cores, {format_bytes(self.device_capacity_bytes)})"
        return f"{ranks} on {here}"

    def _repr_html_(self) -> str:
        config = self.config
        rows = {
            "run": config.name,
            "model": f"{config.model.name_or_path} ({resolve_load_strategy(config)} loading)",
            "runs on": self.describe_machine(),
            "strategy": self.strategy + (", 4-bit base" if config.quantization.load_in_4bit else ", 16-bit base"),
            "data": config.data.source,
        }
        left = "style='text-align:left'"
        head = "".join(
            f"<tr><th {left}>{name}</th><td {left} colspan='2'>{html.escape(text)}</td></tr>"
            for name, text in rows.items()
        )
        found = "".join(
            f"<tr><td {left}>{_GLYPHS[issue.severity]} {issue.severity}</td>"
            f"<td {left}><code>{html.escape(issue.field)}</code></td>"
            f"<td {left}>{html.escape(str(issue).removeprefix(f'{issue.field}: '))}</td></tr>"
            for issue in self.issues
        )
        number = len(self.errors)
        verdict = "Ready to start." if self.ok else f"Can't start: {number} problem{'s' if number != 1 else ''}."
        picture = type(self).picture
        drawn = picture(self) if picture is not None else ""
        return f"<div class='qz3-plan'><p><b>{verdict}</b></p><table>{head}{found}</table>{drawn}</div>"


def make_plan(config: RunConfig, capabilities: Capabilities | None = None) -> Plan:
    """Check ``config`` against a machine, and settle what depends on it. Raises nothing: see :attr:`Plan.errors`.

    Args:
        config: what to run.
        capabilities: the machine; ``None`` looks at this one. :func:`~.capabilities.imagine` makes another.
    """
    machine = capabilities if capabilities is not None else detect()
    inputs = inspect_inputs(config)
    context = Context(config, machine, inputs)
    return Plan(
        config=config,
        capabilities=machine,
        issues=check(config, machine, inputs),
        device=context.device,
        world_size=config.launch.num_processes,
        local_ranks=context.local_ranks,
        deepspeed=context.deepspeed,
        threads_per_rank=context.threads_per_rank,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
