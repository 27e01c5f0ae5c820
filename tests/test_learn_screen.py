"""What long work tells of itself where there is no bar: now and then how far it is, and how long it will take."""

from __future__ import annotations

import contextlib
import io
import pathlib
import time

import pytest
from tiny import make_anchor

from mlx_hiermem.apps.cli import display, learn_screen
from mlx_hiermem.apps.cli.display import duration, progress_bar, staged_progress
from mlx_hiermem.apps.cli.learn import next_step
from mlx_hiermem.apps.cli.learn_screen import Screen


def test_the_time_left_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    now = 1_000.0
    monkeypatch.setattr(learn_screen.time, "monotonic", lambda: now)
    monkeypatch.setenv("COLUMNS", "200")
    screen = Screen(None, lines=True)
    screen.begin("study")
    screen.advance(40, 100, "windows")  # an earlier run did these
    assert capfd.readouterr().err == ""
    now += 30
    screen.advance(45, 100, "windows")
    assert capfd.readouterr().err == ""  # not so soon
    now += 60
    screen.advance(70, 100, "windows")
    assert capfd.readouterr().err == "study     70 of 100 windows, 90 s left\n"
    screen.begin("tree")
    now += 61
    screen.advance(5, 10, "texts embedded")
    assert capfd.readouterr().err == "tree      5 of 10 texts embedded\n"


def test_any_long_command_says_how_far_it_is_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 1_000.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    with progress_bar("pulling") as progress:
        assert progress
        progress(0, 4_000_000)
        now += 20
        progress(1_000_000, 4_000_000)
        assert capfd.readouterr().err == ""  # short work says nothing
        now += 20
        progress(2_000_000, 4_000_000)
    assert capfd.readouterr().err == "pulling, 40 s: 2.0 MB of 4.0 MB, 40 s left\n"
    with progress_bar("asking", unit="questions") as progress:
        assert progress
        progress(20, 1_000)  # done before
        now += 300
        progress(20, 1_000)
    assert capfd.readouterr().err == "asking, 5 min: 20 of 1,000 questions\n"
    with progress_bar("asking", show=False) as progress:
        assert progress is None


def test_a_stage_that_cannot_count_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Writing an anchor for Core AI takes minutes in one call, in which what is printed goes nowhere."""
    monkeypatch.setattr(display, "SILENCE", 0.05)
    with staged_progress("exporting") as (_, say), contextlib.redirect_stderr(io.StringIO()):
        say("writing the anchor")
        time.sleep(0.5)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "exporting, 0 s: writing the anchor"
    assert len(lines) > 2
    assert set(lines[1:]) == {"exporting, 0 s: still writing the anchor"}


def test_durations() -> None:
    assert [duration(seconds) for seconds in (-1, None, 4, 720, 11_160)] == ["0 s", "0 s", "4 s", "12 min", "3.1 h"]


def test_a_base_model_is_not_sent_to_the_chat(tmp_path: pathlib.Path) -> None:
    """It has no chat template; the line names a command that works."""
    make_anchor(tmp_path / "anchor")
    assert next_step(tmp_path) == f"Talk to it: hiermem chat {tmp_path}"
    settings = tmp_path / "anchor/tokenizer_config.json"
    settings.write_text(settings.read_text().replace("chat_template", "unused"))
    assert next_step(tmp_path).startswith(f"Ask it: hiermem ask -m {tmp_path} 'What is …?'")
