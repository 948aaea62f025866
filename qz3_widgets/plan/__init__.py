"""Will it work: a configuration checked against a machine, before anything starts."""

from .capabilities import Capabilities, Gpu, detect, imagine
from .issue import Issue
from .plan import Plan, PlanError, make_plan

__all__ = ["Capabilities", "Gpu", "Issue", "Plan", "PlanError", "detect", "imagine", "make_plan"]
