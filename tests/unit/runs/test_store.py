from __future__ import annotations

import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qz3_widgets.runs.card import GLYPHS, run_card
from qz3_widgets.runs.status import STATES, utc_text
from qz3_widgets.runs.store import Run, RunNotFound, list_runs, open_run
from qz3_widgets.trace.records import TraceWriter

from .conftest import ME, MakeRun, write_trace


def _at(seconds: float) -> str:
    return utc_text(1_800_000_000 + seconds)


def test_newest_first_and_nothing_foreign(make_run: MakeRun, tmp_path: Path) -> None:
    for name, when in (("old", 0), ("newest", 20), ("mid", 10)):
        make_run(name, created=_at(when))
    runs_dir = tmp_path / "runs"
    (runs_dir / "foreign").mkdir()
    (runs_dir / "file.txt").touch()
    (runs_dir / "half").mkdir()
    (runs_dir / "half" / "run.yaml").touch()
    make_run(".hidden.partial")
    (runs_dir / "loop").symlink_to(runs_dir / "loop")
    assert [run.run_id for run in list_runs(runs_dir)] == ["newest", "mid", "old"]
    assert list_runs(tmp_path / "nowhere") == []
    with pytest.raises(ValueError, match=r"file\.txt can't be read as a folder of runs"):
        list_runs(runs_dir / "file.txt")


def test_damaged_runs_are_listed_with_their_problems(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("sound", created=_at(0))
    make_run("broken").run_yaml.write_text("resolved: {lora: {r: many}}")
    make_run("torn").status_json.write_text("{")
    runs = {run.run_id: run for run in list_runs(tmp_path / "runs")}
    assert set(runs) == {"sound", "broken", "torn"}
    assert runs["sound"].problems == ()
    assert "lora.r" in runs["broken"].problems[0]
    assert "status.json" in runs["torn"].problems[0]
    for run in runs.values():
        assert run.run_id in run_card(run)


def test_opening(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_dir = tmp_path / "runs"
    with pytest.raises(RunNotFound, match="holds none"):
        open_run("latest", runs_dir)
    first, second = make_run("demo-r8", created=_at(0)), make_run("demo-r16", created=_at(5))
    make_run("other-r8", created=_at(3))
    assert open_run("latest", runs_dir).layout == second
    assert open_run("demo-r8", runs_dir).layout == first
    assert open_run("demo-r1", runs_dir).layout == second
    assert open_run("oth", runs_dir).run_id == "other-r8"
    assert open_run(first.root).layout == first
    assert open_run(str(first.root) + os.sep).layout == first
    assert open_run(Run(first)).layout == first
    monkeypatch.chdir(runs_dir)
    assert open_run("./demo-r8", tmp_path).layout == first
    with pytest.raises(RunNotFound, match="2 runs in .* begin with 'demo': demo-r16, demo-r8; write more"):
        open_run("demo", runs_dir)
    with pytest.raises(RunNotFound, match="no run 'dmeo-r8' .*nearest are demo-r8"):
        open_run("dmeo-r8", runs_dir)
    with pytest.raises(RunNotFound):
        open_run("", runs_dir)
    with pytest.raises(RunNotFound, match="nearest"):
        open_run(tmp_path / "elsewhere" / "demo-r8", runs_dir)


def test_what_a_run_tells(make_run: MakeRun) -> None:
    run = Run(make_run(config={"lora.r": 4}))
    assert run.config.lora.r == 4
    assert run.given == {"lora": {"r": 4}}
    assert run.preset is None
    assert run.state == "pending"
    assert run.adapter_dir is None
    run.layout.adapter_dir.mkdir()
    (run.layout.adapter_dir / "adapter_config.json").touch()
    assert run.adapter_dir == run.layout.adapter_dir
    with pytest.raises(ValueError, match=r"manifest\.json can't be read"):
        _ = run.manifest
    assert repr(run) == f"Run({str(run.layout.root)!r}, pending)"
    assert run == Run(run.layout.root)
    assert len({run, Run(run.layout.root)}) == 1


def test_records(make_run: MakeRun) -> None:
    run = Run(make_run())
    for rank in (0, 1):
        write_trace(run.layout, rank, "succeeded")
    frame = run.memory().frame
    assert sorted(frame["rank"].unique()) == [0, 1]
    assert len(run.memory(ranks=[1]).headers) == 1
    assert len(run.metrics()) == 0


def test_tail_of_a_log(make_run: MakeRun) -> None:
    run = Run(make_run())
    assert run.tail_log() == ""
    run.layout.launcher_log.write_text("".join(f"line {number} {'x' * 90}\n" for number in range(5000)))
    assert run.tail_log(num_lines=2).split()[1::3] == ["4998", "4999"]
    assert len(run.tail_log(num_lines=4000).splitlines()) == 4000
    assert len(run.tail_log(num_lines=9000).splitlines()) == 5000
    assert run.tail_log(num_lines=0) == ""
    run.layout.rank_log(1).write_bytes(b"HF_TOKEN=plainword123\n\xff torn")
    assert run.tail_log(1) == "HF_TOKEN=***\n\ufffd torn"
    assert run.tail_log(0) == ""


def test_tags_and_notes(make_run: MakeRun) -> None:
    run = Run(make_run())
    assert (run.tags, run.notes) == ((), "")
    run.annotate(tags=["keep", "r8", "keep"])
    run.annotate(notes="token hf_Planted0Secret0Planted")
    again = Run(run.layout.root)
    assert again.tags == ("keep", "r8")
    assert again.notes == "token hf_***"


def test_deleting(make_run: MakeRun, tmp_path: Path) -> None:
    running = Run(make_run("a", state="running", pid=ME.pid, pid_created=ME.created))
    with pytest.raises(ValueError, match="a is running: stop it before you delete it"):
        running.delete()
    assert running.layout.run_yaml.exists()
    ended = Run(make_run("b", state="failed", ended=_at(0)))
    ended.delete()
    rendered = Run(make_run("c", launched_by="launch.sh"))
    rendered.delete()
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["a"]
    with pytest.raises(ValueError, match="holds no run"):
        Run(tmp_path).delete()
    assert tmp_path.exists()


class _Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "


def _text(html: str) -> str:
    checker = _Checker()
    checker.feed(html)
    assert checker.open == []
    return re.sub(r"\s+", " ", checker.text)


def test_card(make_run: MakeRun) -> None:
    layout = make_run(
        state="failed", started=_at(0), ended=_at(112), failed_rank=1, error="ValueError: <b>bad</b> & worse",
        exit_code=1, attempt=2, config={"model.name_or_path": "a<b>/model"},
    )  # fmt: skip
    for rank in (0, 1):
        write_trace(layout, rank)
    metrics = TraceWriter(layout.metrics, {"kind": "header"})
    for step, loss in ((1, 2.5), (2, 1.25)):
        metrics.append({"kind": "metrics", "event": "step", "step": step, "max_steps": 20, "loss": loss})
    metrics.append({"kind": "metrics", "event": "eval", "step": 2, "eval_loss": 1.5})
    html = Run(layout)._repr_html_()
    text = _text(html)
    assert "✕ failed" in text
    assert "rank 1: ValueError: <b>bad</b> & worse" in text
    assert "2 ranks, a<b>/model, 4-bit NF4, ZeRO-3" in text
    assert "1 min 52 s" in text
    assert "attempt 2" in text
    assert "2 of 20" in text
    assert "training 2.500 → 1.250" in text
    assert "held out 1.500" in text
    assert "rank 0 100.0 MiB, rank 1 101.0 MiB" in text
    assert "http" not in html


def test_every_state_has_a_glyph(make_run: MakeRun) -> None:
    assert set(GLYPHS) == set(STATES)
    assert len(set(GLYPHS.values())) == len(STATES)
    for state in STATES:
        layout = make_run(state, state=state, ended=_at(0), started=_at(-3), pid=ME.pid, pid_created=ME.created)
        if state != "pending":
            assert f"{GLYPHS[state]} {state}" in _text(run_card(Run(layout)))


def test_card_of_many_ranks_names_the_extremes(make_run: MakeRun) -> None:
    layout = make_run()
    for rank in range(12):
        write_trace(layout, rank, world_size=12)
    assert "100.0 MiB (rank 0) to 111.0 MiB (rank 11)" in _text(run_card(Run(layout)))


def test_a_card_is_quick(make_run: MakeRun) -> None:
    layout = make_run()
    for rank in (0, 1):
        write_trace(layout, rank)
    run_card(Run(layout))  # imports
    begin = time.perf_counter()
    run_card(Run(layout))
    assert time.perf_counter() - begin < 0.5
