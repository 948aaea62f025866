"""All checks of a configuration against a machine, in one list."""

from __future__ import annotations

from ..config.schema import RunConfig
from . import field_rules, machine_rules
from .capabilities import Capabilities
from .context import Context
from .inputs import Inputs, inspect_inputs
from .issue import Issue, worst_first

RULES = (*field_rules.RULES, *machine_rules.RULES)
"""Each takes a :class:`~.context.Context` and yields issues. None of them changes anything."""


def check(config: RunConfig, machine: Capabilities, inputs: Inputs | None = None) -> tuple[Issue, ...]:
    """Every issue of ``config`` on ``machine``, the worst first. Never stops at the first one.

    Args:
        config: a configuration that fits the schema.
        machine: where it is to run.
        inputs: what the files have shown; ``None`` looks at them.
    """
    found = inputs if inputs is not None else inspect_inputs(config)
    context = Context(config, machine, found)
    issues = [issue for rule in RULES for issue in rule(context)]
    return worst_first([*found.issues, *issues])
