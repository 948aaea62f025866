"""The ``qz3`` command. Exit codes: 0 fine, 1 the run failed, 2 bad input (one message, no traceback)."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from . import cli_lab
from .cli_queue import queue_app
from .config.changes import apply_overrides
from .config.io import dump_config, load_config
from .config.presets import PRESET_GPUS, PRESETS, preset, preset_description
from .config.schema import RunConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="QLoRA with DeepSpeed ZeRO-3: configure, launch, trace, read back, compare.",
)
app.add_typer(queue_app, name="queue")
app.command()(cli_lab.lab)
app.command()(cli_lab.app)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file, as 'qz3 init' writes it, or a preset's name.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field; may be repeated.")
]
RunsDir = Annotated[Path, typer.Option(envvar="QZ3_RUNS_DIR", help="Folder of the run directories.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Run id, its beginning, a path, or 'latest'.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")]
Detach = Annotated[bool, typer.Option("--detach", help="Return at once; the run goes on by itself.")]


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the presets and the hardware each is meant for."""
    rows = [
        {"name": name, "description": preset_description(name), "meant_for": str(PRESET_GPUS[name])} for name in PRESETS
    ]
    if as_json:
        _print_json(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        out.print(f"{row['name']:<{width}}  {row['meant_for']:<16}  {row['description']}", soft_wrap=True)


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="PRESET", help="See 'qz3 presets'.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; standard output if empty.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write a preset as a YAML file to start from, every field with what it means."""
    text = dump_config(apply_overrides(preset(name), overrides or []))
    if output is None:
        print(text, end="")  # noqa: T201 - the document itself
        return
    if output.exists():
        raise ValueError(f"{output} exists; name another file or remove it")
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{output} can't be written: {error.strerror or error}") from error
    err.print(f"wrote {escape(str(output))}; next: qz3 run {escape(shlex.quote(str(output)))}", soft_wrap=True)


@app.command()
def render(
    config: ConfigFile, directory: Annotated[Path, typer.Argument(metavar="DIR")], overrides: Overrides = None
) -> None:
    """Write everything that a run needs into DIR, without starting it: 'bash DIR/launch.sh' does."""
    from .launch.directory import render_into
    from .launch.process import choose_port
    from .plan.plan import make_plan

    plan = make_plan(_load(config, overrides))
    _show_issues(plan.issues)
    plan.raise_if_blocked()
    layout = render_into(plan, directory, port=choose_port(plan.config.launch))
    err.print(
        f"wrote {escape(str(layout.root))}; next: bash {escape(shlex.quote(str(layout.launch_sh)))}", soft_wrap=True
    )


@app.command()
def plan(
    config: ConfigFile,
    gpus: Annotated[int | None, typer.Option(help="Imagine so many GPUs, one for each rank.", min=1)] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory of each imagined GPU, GiB.", min=0.1)
    ] = None,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Predict each rank's memory by phase and component: does it fit, what takes it, what to change. Starts nothing.

    Exit code 1 if it does not fit.
    """
    from .analysis.learned import learn
    from .plan.imagined import on_imagined
    from .plan.plan import make_plan
    from .plan.prospect import prospect
    from .terminal_plan import show_prospect

    wanted = _load(config, overrides)
    made = make_plan(wanted) if gpus is None and gpu_memory is None else on_imagined(wanted, gpus, gpu_memory)
    found = prospect(made, overhead=learn(runs_dir, made.device, made.world_size))
    if as_json:
        _print_json(found.to_json())
    else:
        show_prospect(found, out, command=_words(config, overrides))
    raise typer.Exit(0 if found.fit.fits else 1)


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    detach: Detach = False,
    even_if_too_large: Annotated[
        bool, typer.Option("--even-if-too-large", help="Start it even if the plan says that it does not fit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start a run and follow it to its end. Ctrl-C stops it; what it recorded stays."""
    from .launch.process import start
    from .plan.plan import make_plan
    from .plan.prospect import refuse_if_too_large

    plan = make_plan(_load(config, overrides))
    _show_issues(plan.issues)
    plan.raise_if_blocked()
    _see_the_shape(plan.config)
    if not even_if_too_large:
        refuse_if_too_large(plan)
    _follow_and_exit(start(plan, runs_dir=runs_dir), detach=detach, as_json=as_json)


@queue_app.command("add")
def add_to_queue(
    config: ConfigFile,
    overrides: Overrides = None,
    made_from: Annotated[
        str | None, typer.Option("--preset", help="The preset that it was made from: run.yaml tells the differences.")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    even_if_too_large: Annotated[
        bool, typer.Option("--even-if-too-large", help="Start it even if the plan says that it does not fit.")
    ] = False,
) -> None:
    """Put a run at the end of the queue; it starts when no other run of the folder goes on."""
    from .launch.queue import Queue
    from .plan.plan import make_plan

    wanted = _load(config, overrides)
    plan = make_plan(wanted)
    _show_issues(plan.issues)
    plan.raise_if_blocked()
    _see_the_shape(wanted)
    entry = Queue(runs_dir).add(wanted, preset=made_from, even_if_too_large=even_if_too_large)
    out.print(f"queued {escape(entry.entry_id)}", soft_wrap=True)


@app.command()
def rehearse(
    config: ConfigFile,
    world_size: Annotated[int | None, typer.Option(help="Ranks to pretend; the configuration's, if empty.")] = None,
    rank: Annotated[int, typer.Option(help="The rank to be.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps to take.")] = 3,
    layers: Annotated[int | None, typer.Option(help="Only so many of the model's layers; all, if empty.")] = None,
    arithmetic: Annotated[
        bool | None,
        typer.Option(help="Compute products of matrices, or only take their memory; only on a GPU, if empty."),
    ] = None,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    detach: Detach = False,
    as_json: AsJson = False,
) -> None:
    """Be one rank of many on this machine's one device: real memory, random weights, no communication.

    Nothing is downloaded: the model's shape comes from a folder, or with the package. Losses mean nothing here.
    """
    from .launch.process import start
    from .plan.rehearsal import make_rehearsal

    wanted = _load(config, overrides)
    ranks = world_size or wanted.launch.num_processes
    plan = make_rehearsal(wanted, ranks, rank=rank, steps=steps, num_layers=layers, arithmetic=arithmetic)
    _show_issues(plan.issues)
    _follow_and_exit(start(plan, runs_dir=runs_dir), detach=detach, as_json=as_json)


@app.command()
def ladder(
    config: ConfigFile,
    world_size: Annotated[int | None, typer.Option(help="Ranks to pretend; the configuration's, if empty.")] = None,
    rungs: Annotated[str, typer.Option(help="Numbers of layers, two at least.")] = "2,4",
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Start small, scale up: rehearse the model with 2, then 4 layers, and extrapolate to its full depth.

    Each rung is set beside the plan's prediction; the first that is not as predicted stops, with exit code 1.
    """
    from .ladder import climb
    from .terminal_plan import show_rung

    wanted = _load(config, overrides)
    ranks = world_size or wanted.launch.num_processes
    try:
        numbers = [int(number) for number in rungs.split(",")]
    except ValueError as error:
        raise ValueError(f"--rungs must be numbers of layers such as 2,4, not {rungs}") from error
    found = []
    err.print(f"{ranks} ranks pretended; each rung is a rehearsal of half a minute or more", soft_wrap=True)
    for rung in climb(wanted, ranks, runs_dir=runs_dir, rungs=numbers):
        found.append(rung)
        if not as_json:
            show_rung(rung, out)
    if as_json:
        _print_json({"ok": all(rung.ok for rung in found), "rungs": [rung.to_json() for rung in found]})
    raise typer.Exit(0 if all(rung.ok for rung in found) else 1)


@app.command()
def resume(name: RunName, runs_dir: RunsDir = Path("runs"), detach: Detach = False, as_json: AsJson = False) -> None:
    """Go on from a run's newest checkpoint."""
    from .launch.process import resume as resume_run

    _follow_and_exit(resume_run(_open(name, runs_dir).layout.root), detach=detach, as_json=as_json)


@app.command()
def stop(name: RunName, runs_dir: RunsDir = Path("runs"), grace_seconds: float = 10.0) -> None:
    """Stop a run: its processes are asked to end, then killed."""
    from .launch.process import stop as stop_run

    out.print(stop_run(_open(name, runs_dir).layout.root, grace_seconds).message, markup=False)


@app.command()
def runs(runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """List the runs, newest first."""
    from .analysis.summary import summarize
    from .runs.store import list_runs
    from .terminal import show_runs

    found = list_runs(runs_dir)
    summaries, damaged = [], []
    for each in found:
        try:
            summaries.append(summarize(each))
        except ValueError as error:  # one damaged run must not hide the others
            damaged.append({"run_id": each.run_id, "state": "damaged", "problem": str(error)})
    if as_json:
        _print_json([*({k: v for k, v in s.items() if k != "config"} for s in summaries), *damaged])
        return
    if not found:
        out.print(f"no runs in {escape(str(runs_dir))} yet; 'qz3 demo' makes two", soft_wrap=True)
    elif summaries:
        show_runs(summaries, out)
    for row in damaged:
        err.print(f"{escape(row['run_id'])} can't be read: {escape(row['problem'])}", soft_wrap=True)


@app.command()
def show(name: RunName, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Show one run: state, losses, speed, peaks per rank and phase; which rank failed, and when."""
    from .analysis.summary import summarize
    from .terminal import show_summary

    summary = summarize(_open(name, runs_dir))
    if as_json:
        _print_json(summary)
    else:
        show_summary(summary, out)


@app.command()
def verify(name: RunName, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Prove a run: sharded by ZeRO-3 from the start, really in 4 bit, all of the adapter trained; else exit code 1."""
    from .analysis.proof import prove
    from .terminal_proof import show_proof

    proof = prove(_open(name, runs_dir))
    if as_json:
        _print_json(proof.to_json())
    else:
        show_proof(proof, out)
    raise typer.Exit(0 if proof.ok else 1)


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN...")],
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Compare runs: what differs in their configurations, and their figures with the better one marked."""
    from .analysis.compare import compare as compare_runs
    from .terminal import show_comparison

    comparison = compare_runs([_open(name, runs_dir) for name in names])
    if as_json:
        _print_json(comparison.to_json())
    else:
        show_comparison(comparison, out)


@app.command()
def export(
    names: Annotated[list[str], typer.Argument(metavar="RUN... FILE.html|FILE.ipynb")], runs_dir: RunsDir = Path("runs")
) -> None:
    """Write one or more runs as a single HTML file that needs nothing else, or as a notebook that draws them anew."""
    from .plotting.report import export_html
    from .plotting.report_notebook import export_notebook

    *chosen, target = names
    if not chosen or not target.endswith((".html", ".htm", ".ipynb")):
        raise ValueError(
            "name at least one run, and then a file that ends in .html or .ipynb: qz3 export RUN FILE.html"
        )
    write = export_notebook if target.endswith(".ipynb") else export_html
    written = write([_open(name, runs_dir) for name in chosen], Path(target))
    err.print(f"wrote {escape(str(written))}", soft_wrap=True)


@app.command()
def demo(
    runs_dir: RunsDir = Path("runs"),
    overrides: Overrides = None,
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Only unpack the model and the data.")] = False,
) -> None:
    """Two short ZeRO-3 QLoRA runs of a real model on real text, and what came of them."""
    from .terminal_demo import run_demo

    failed = run_demo(runs_dir, overrides or [], out, prepare_only=prepare_only)
    raise typer.Exit(1 if failed else 0)


def main() -> None:
    """Entry point of the command: errors that a user can mend are one message and exit code 2."""
    # Typer shows usage errors itself, with exit code 2, and ends quietly where the reader of a pipe goes away.
    try:
        app()
    except ValueError as error:
        for number, line in enumerate(str(error).splitlines() or ["unknown error"]):
            err.print(f"[red]error:[/] {escape(line)}" if number == 0 else escape(line), soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _load(path: Path, overrides: list[str] | None) -> RunConfig:
    name = str(path)
    # A word is a preset, or one that is misspelled.
    if not path.exists() and path.suffix not in (".yaml", ".yml") and path.name == name:
        try:
            given = preset(name)
        except ValueError as error:
            raise ValueError(f"{name}: no such file, and {error}") from error
    else:
        given = load_config(path)
    return apply_overrides(given, overrides or [])


def _see_the_shape(config: RunConfig) -> None:
    """Have the model's shape at hand, so that its memory is predicted; without it the run starts all the same."""
    from .plan.shapes import can_be_known, known_shape, model_shape

    if known_shape(config) is None and can_be_known(config):
        err.print("reading the model's shape: once, some ten seconds", soft_wrap=True)
        try:
            model_shape(config)
        except ValueError as error:
            err.print(f"warning: its memory is not predicted: {escape(str(error))}", soft_wrap=True)


def _words(config: Path, overrides: list[str] | None) -> str:
    """The arguments that name a configuration, as they are typed."""
    return " ".join(shlex.quote(word) for word in (str(config), *(f"--set={each}" for each in overrides or [])))


def _open(name: str, runs_dir: Path) -> Any:
    from .runs.store import open_run

    return open_run(name, runs_dir)


def _show_issues(issues: Any) -> None:
    for issue in issues:
        if issue.severity != "error":
            err.print(f"{issue.severity}: {escape(str(issue))}", soft_wrap=True)


def _follow_and_exit(started: Any, *, detach: bool, as_json: bool) -> None:
    from .analysis.summary import summarize
    from .launch.process import stop as stop_run
    from .terminal import follow, show_summary

    err.print(f"run {escape(started.run_id)} in {escape(str(started.layout.root))}", soft_wrap=True)
    if detach:
        if as_json:
            _print_json(started.status.to_json())
        return
    try:
        status = follow(started, err)
    except KeyboardInterrupt:
        err.print("stopping the run; what it recorded stays")
        status = stop_run(started.layout.root).status
    summary = summarize(started)
    if as_json:
        _print_json(summary)
    else:
        show_summary(summary, out)
    if status.state == "failed":
        err.print(f"the logs are in {escape(str(started.layout.logs_dir))}", soft_wrap=True)
    raise typer.Exit({"succeeded": 0, "cancelled": 130}.get(status.state, 1))


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))  # noqa: T201 - the document itself
