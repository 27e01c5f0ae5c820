"""How far a run of learning is, for whoever watches it: the file, the server's answer, the page."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from browsing import ask, load_aimed, make_paged, opened, replies_cut, watched
from playwright.sync_api import Browser, expect
from serving import serving

from mlx_hiermem.learn.stages import POINTS, STATUS, Recorder, Silent, read_status
from mlx_hiermem.learn.train.monitor import TrainingProgress


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def end(self, line: str) -> None:
        self.lines.append(line)


def learning(tokens: int, loss: float) -> TrainingProgress:
    return TrainingProgress("learning", "1", tokens, 1_000, 50.0, loss)


def begun(out: pathlib.Path, clock: list[float]) -> Recorder:
    """A run in the midst of its training; `clock` has the time."""
    (work := out.with_name(out.name + ".learn")).mkdir()
    recorder = Recorder(Silent(), work / STATUS, lambda: clock[0])
    recorder.begin("corpus")
    recorder.end("3 documents in 9 windows")
    recorder.begin("training")
    for tokens in range(100, 500, 100):
        clock[0] += 10
        recorder.training(learning(tokens, 4 - tokens / 200))
    clock[0] += 10
    recorder.training(TrainingProgress("measured", "1", 400, 1_000, 0.0, losses={"none": 3.0, "x": float("nan")}))
    recorder.training(learning(400, 2.0))
    return recorder


def test_a_run_tells_how_far_it_is(tmp_path: pathlib.Path) -> None:
    out, clock = tmp_path / "model", [1_000.0]
    assert read_status(out) == {"state": "nothing"}
    recorder = begun(out, clock)
    found = read_status(out)
    assert (found["state"], found["pid"]) == ("running", os.getpid())
    assert found["stages"] == [{"stage": "corpus", "line": "3 documents in 9 windows"}]
    assert (found["stage"], found["done"], found["total"]) == ("training", 400, 1_000)
    assert found["seconds_left"] == 12  # 600 tokens, 50 a second
    assert [loss for _, loss in found["loss"]] == [3.5, 3.0, 2.5, 2.0, 2.0]
    assert found["measured"] == [{"tokens": 400, "job": "1", "losses": {"none": 3.0}}]
    recorder.training(learning(450, 1.9))
    assert read_status(out) == found  # not so soon
    assert read_status(out, lambda process: False)["state"] == "stopped"
    for tokens in range(10 * POINTS):
        recorder.training(learning(500 + tokens, 1.0))
    recorder.begin("bank")
    points = read_status(out)["loss"]
    assert POINTS / 2 <= len(points) <= POINTS
    assert points[-1][0] == 499 + 10 * POINTS
    (out / "learning").mkdir(parents=True)
    (out / "learning/report.json").write_text('{"documents": 3}')
    assert read_status(out)["state"] == "running"  # until its folder goes
    (tmp_path / "model.learn" / STATUS).write_text("{")
    assert read_status(out) == {"state": "done", "report": {"documents": 3}}


def test_what_cannot_be_written_stops_no_run(tmp_path: pathlib.Path) -> None:
    heard = Heard()
    recorder = Recorder(heard, tmp_path / "gone" / STATUS)
    recorder.begin("corpus")
    recorder.advance(1, None, "documents")
    recorder.end("done")
    assert heard.lines == ["done"]


def test_the_page_shows_a_run(browser: Browser, tmp_path: pathlib.Path) -> None:
    out, folder = tmp_path / "second", make_paged(tmp_path / "first")
    work = tmp_path / "second.learn"
    settings: dict[str, Any] = {"watch": [out], "allow_loading": True, "name": "first"}
    with serving(lambda: load_aimed(folder), **settings) as server, watched(browser) as context, replies_cut():
        page = opened(context, server)
        button = page.locator("#open-learning")
        expect(button).to_have_text("Learning")
        button.click()
        expect(page.locator(".runs section")).to_contain_text("Nothing is being learnt here yet")
        begun(out, [1_000.0])
        runs = page.locator(".runs")
        expect(runs.locator(".stages li")).to_have_text("corpus 3 documents in 9 windows")
        expect(runs).to_contain_text("training · 400 of 1,000 tokens · 12 s left")
        expect(runs.locator("progress")).to_have_attribute("value", "400")
        expect(runs.locator("svg")).to_have_attribute("aria-label", "Loss from 3.50 to 2.00")
        expect(button).to_have_text("Learning 40 %")
        status, answer = server.json("GET", "/v1/learning")
        assert (status, "pid" in answer["runs"][0]) == (200, False)
        told = json.loads((work / STATUS).read_text()) | {"pid": 0}
        (work / STATUS).write_text(json.dumps(told))
        expect(runs).to_contain_text("Stopped in stage training. The same command goes on from there.")
        make_paged(out)
        (out / "learning").mkdir()
        report = {
            "documents": 3,
            "windows": 9,
            "perplexity": {"none": 20.0, "fetched": 4.0},
            "perplexity_of": "texts",
        }
        (out / "learning/report.json").write_text(json.dumps(report))
        (work / STATUS).unlink()
        expect(runs).to_contain_text("Perplexity of texts: none 20.0, fetched 4.0.")
        page.get_by_role("button", name="Load it").click()
        expect(page.locator("#models")).to_have_value("second")
        expect(page.locator("#about")).to_contain_text("second has")
        assert ask(page, "tell me of neon")


def test_a_server_that_watches_nothing(browser: Browser, tmp_path: pathlib.Path) -> None:
    folder = make_paged(tmp_path / "model")
    with serving(lambda: load_aimed(folder)) as server, watched(browser) as context:
        assert server.json("GET", "/v1/learning") == (200, {"runs": []})
        page = opened(context, server)
        page.wait_for_timeout(1500)
        assert page.locator("#open-learning").is_hidden()
