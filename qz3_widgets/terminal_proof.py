"""What ``qz3 verify`` shows: the verdict, then one line for each check. No decisions here."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from .analysis.proof import Proof
from .units import format_bytes

_MARKS = {"passed": "[green]✓[/]", "failed": "[red]✕[/]", "unknown": "[yellow]?[/]", "skipped": "[dim]–[/]"}


def show_proof(proof: Proof, console: Console) -> None:
    """The verdict on top; a check that does not apply is left out."""
    mark = _MARKS["passed" if proof.ok else "failed"]
    console.print(f"[bold]{escape(proof.run_id)}[/]", soft_wrap=True)
    console.print(f"{mark} {'ok' if proof.ok else 'not ok'}: {escape(proof.sentence)}", soft_wrap=True)
    for check in proof.checks:
        if check.outcome != "skipped":
            unknown = "not known: " if check.outcome == "unknown" else ""
            console.print(f"  {_MARKS[check.outcome]} {unknown}{escape(check.sentence)}", soft_wrap=True)
    shown = {proof.sentence, *(check.sentence for check in proof.checks)}
    for reason in proof.reasons:
        if reason not in shown:
            console.print(f"  {_MARKS['failed']} {escape(reason)}", soft_wrap=True)
    for rank, probe in sorted(proof.probes.items()):
        if "loaded" in probe:
            loaded = probe["loaded"]
            held, total = format_bytes(loaded["held_bytes"]), format_bytes(loaded["bytes"])
            console.print(f"  rank {rank}: {held} of {total} after loading", soft_wrap=True)
