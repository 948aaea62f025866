"""``qz3 queue``: runs one after another, reorderable, which go on without a terminal or a notebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from .launch.queue import Queue

queue_app = typer.Typer(no_args_is_help=True, help="Runs one after another: add, list, move, remove, pause, go-on.")
_out = Console(highlight=False)

RunsDir = Annotated[Path, typer.Option(envvar="QZ3_RUNS_DIR", help="Folder of the run directories.")]
Name = Annotated[str, typer.Argument(metavar="ENTRY", help="Id of an entry, its beginning, or the run's name.")]


@queue_app.command("list")
def list_entries(
    runs_dir: RunsDir = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, nothing else.")] = False,
) -> None:
    """Show what waits, in order, and what could not be started."""
    queue = _queue(runs_dir)
    state, entries = queue.state(), queue.entries()
    if as_json:
        rows = [
            {
                "entry_id": entry.entry_id,
                "name": entry.name,
                "model": entry.config.model.name_or_path,
                "added": entry.added,
                "error": entry.error,
            }
            for entry in entries
        ]
        document = {
            "paused": state.paused,
            "running": state.running,
            "runner_alive": state.runner_alive,
            "entries": rows,
            "damaged": list(queue.damaged()),
        }
        print(json.dumps(document, indent=2, ensure_ascii=False))  # noqa: T201 - the document itself
        return
    if state.running:
        _say(f"running: {state.running}")
    for place, entry in enumerate((entry for entry in entries if entry.error is None), 1):
        _say(f"{place}  {entry.entry_id}  {entry.config.model.name_or_path}")
    for entry in entries:
        if entry.error is not None:
            _say(f"not started: {entry.entry_id}: {entry.error}")
    for problem in queue.damaged():
        _say(problem)
    if state.paused:
        _say("paused; 'qz3 queue go-on' starts the next one")
    elif state.num_waiting and not state.runner_alive:
        _say("nobody works it off: its process has ended; 'qz3 queue go-on' starts another")
    elif not entries and not state.running:
        _say("the queue is empty; 'qz3 queue add CONFIG' puts a run into it")


@queue_app.command()
def move(
    name: Name,
    place: Annotated[
        int,
        typer.Argument(metavar="PLACE", help="Its new place, as 'qz3 queue list' counts: 1 is the next one.", min=1),
    ],
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Put an entry at another place; one that could not be started is tried again."""
    queue = _queue(runs_dir)
    queue.move(queue.find(name).entry_id, place - 1)
    list_entries(runs_dir)


@queue_app.command()
def remove(name: Name, runs_dir: RunsDir = Path("runs")) -> None:
    """Take an entry out."""
    queue = _queue(runs_dir)
    entry = queue.find(name)
    queue.remove(entry.entry_id)
    _say(f"removed {entry.entry_id}")


@queue_app.command()
def pause(runs_dir: RunsDir = Path("runs")) -> None:
    """Start nothing more; what runs goes on."""
    _queue(runs_dir).pause()
    _say("paused")


@queue_app.command("go-on")
def go_on(runs_dir: RunsDir = Path("runs")) -> None:
    """Start the next one again."""
    _queue(runs_dir).go_on()
    _say("goes on")


def _say(text: str) -> None:
    _out.print(escape(text), soft_wrap=True)


def _queue(runs_dir: Path) -> Queue:
    from .launch.queue import Queue

    return Queue(runs_dir)
