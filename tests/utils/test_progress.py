"""Progress where no terminal is."""

import io

import pytest
from rich.console import Console

from nemoe_jax.utils import progress
from nemoe_jax.utils.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_in_half_a_minute(clock, capsys):
    with progress_bar("loss") as bar:
        task = bar.add_task("carving dense", total=10, completed=2, loss="")  # taken up again behind two
        for seconds in (20, 20, 20, 20):
            clock[0] += seconds
            bar.update(task, advance=1, loss="1.2")
    assert capsys.readouterr().err.splitlines() == [
        "carving dense: 4 of 10, 0:00:40 so far, 0:02:00 left",
        "carving dense: 6 of 10, 0:01:20 so far, 0:01:20 left",
    ]


def test_of_an_unknown_whole_only_what_is_done_is_said(clock, capsys):
    with progress_bar() as bar:
        task = bar.add_task("reading", total=None)
        clock[0] += 31
        bar.advance(task, 12345)
    assert capsys.readouterr().err == "reading: 12,345, 0:00:31 so far\n"


def test_track_prints_too(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar() as bar:
        assert list(bar.track(range(3), description="scoring")) == [0, 1, 2]
    assert capsys.readouterr().err.splitlines()[-1].startswith("scoring: 3 of 3, ")


@pytest.mark.parametrize("settings", [{"visible": False}, {"lines": False}])
def test_no_line_where_none_is_wanted(clock, capsys, settings):
    with progress_bar(**settings) as bar:
        task = bar.add_task("carving", total=2)
        clock[0] += 100
        bar.advance(task)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar() as bar:
        bar.advance(bar.add_task("carving", total=2))
    assert "carving" in screen.getvalue() and "1/2" in screen.getvalue()
    assert capsys.readouterr().err == ""
