from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qz3_widgets.plotting.report import export_html
from qz3_widgets.runs.store import Run
from tests.fake_runs import make_run

SECRET = "hf_AbcdefGh12345678"


class Checker(HTMLParser):
    """Collects what a page loads, and whether every element is closed."""

    VOID = ("meta", "br", "rect", "path", "use", "line", "img", "link")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def check(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.stack == []
    assert "script" not in checker.tags
    assert all(load.startswith("#") for load in checker.loads)
    # Names of namespaces are no addresses to load from; nothing else may look like one.
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "url(" not in text or set(re.findall(r"url\(([^)]*)\)", text)) <= set(re.findall(r"url\((#[^)]*)\)", text))
    return text


def test_one_run(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path, config={"lora": {"r": 8}}))
    path = export_html(run, tmp_path / "report.html")
    text = check(path)
    assert "<title>demo-r8-20260917-121314</title>" in text
    for words in (
        "Succeeded in 57 s: evaluation loss fell", "Memory per rank", "Peaks", "lora.r", "All ", "peak of a step",
        "Provenance", "torch 2.13.0", "0123456789ab on main", "prefers-color-scheme: dark",
    ):  # fmt: skip
        assert words in text
    assert text.count("<svg") == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["demo-r8-20260917-121314", "report.html"]


def test_several_runs(tmp_path: Path) -> None:
    runs = [
        Run(make_run(tmp_path, run_id=f"run{i}-20260917-121314", config={"lora": {"r": 2**i}}, **extra))
        for i, extra in enumerate([{}, {"state": "failed", "num_steps": 4}, {"state": "running", "max_steps": 50}])
    ]
    text = check(export_html(runs, tmp_path / "report.html"))
    assert "3 runs compared" in text
    assert "Configuration: 2 of" in text or "Configuration: 1 of" in text
    assert "Memory, each rank" in text
    assert text.count("<h2>") == 3
    assert "What was logged last" in text


def test_a_failed_run_shows_its_log_without_secrets(tmp_path: Path) -> None:
    error = f"ValueError: <img src=x onerror=alert(1)> {SECRET}"
    run = Run(make_run(tmp_path, state="failed", num_steps=3, error=error,
                       config={"launch": {"environment": {"NOTE": SECRET}}}))  # fmt: skip
    manifest = run.layout.manifest_json
    manifest.write_text(manifest.read_text().replace("train_qlora.py", f"--note {SECRET} </script>"))
    text = check(export_html(run, tmp_path / "report.html"))
    assert SECRET not in text
    assert "<img" not in text
    assert "&lt;img src=x" in text
    assert "Traceback (most recent call last)" in text
    assert "log of rank 1" in text


@pytest.mark.parametrize("break_it", ["run.yaml", "manifest.json", "logs", "trace"])
def test_a_damaged_run_still_has_a_report(tmp_path: Path, break_it: str) -> None:
    import shutil

    run_dir = make_run(tmp_path, state="failed", num_steps=3)
    target = run_dir / break_it
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.write_text("{")
    check(export_html(Run(run_dir), tmp_path / "report.html"))


def test_bad_targets(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path))
    with pytest.raises(ValueError, match=r"ends in \.html"):
        export_html(run, tmp_path / "report.pdf")
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        export_html(run, tmp_path / "nowhere" / "report.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        export_html(run, tmp_path / "folder.html")
    with pytest.raises(ValueError, match="one run or more"):
        export_html([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(make_run(tmp_path))
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qz3_widgets.runs.files.os.fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        export_html(run, target)
    assert target.read_text() == "old"
