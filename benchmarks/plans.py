"""The settings that `learn_settings.py` compares, plan by plan: each plan changes one thing for one finding."""

from __future__ import annotations

from dataclasses import replace

from material import REPORT, Setting

BASE = Setting()
SHORT = replace(BASE, study=3.0)  # where steps take twice as long
DEMO = Setting(  # as `make vital`, but of two writers' study
    480, 0, 100.0, 2, "ffn", (11, 11), "uniform", branching=8, epochs=2, rows=REPORT
)
PLANS: dict[str, dict[str, Setting]] = {
    # 2: five kinds at equal size: 1 728 weights a layer and unit of ffn, 1 920 of lora-qk and -vo, 6 336, 1 152
    "kinds": {
        "ffn": BASE,
        "lora-ffn": replace(BASE, kind="lora-ffn", sizes=(9, 9)),
        "lora-qk": replace(BASE, kind="lora-qk", sizes=(29, 29)),
        "lora-vo": replace(BASE, kind="lora-vo", sizes=(29, 29)),
        "kv": replace(BASE, kind="kv", sizes=(48, 48)),
    },
    # 3: levels at equal fetch size
    "levels": {
        "64 at level 1": replace(BASE, sizes=(64, 0)),
        "32 and 32": BASE,
        "16 and 48": replace(BASE, sizes=(16, 48)),
        "64 in the leaf": replace(BASE, sizes=(0, 64)),
    },
    # 4: layers at equal size: a third of the units in three times as many
    "layers": {
        "late": SHORT,
        "uniform": replace(SHORT, layers="uniform", sizes=(11, 11)),
        "middle": replace(SHORT, layers="middle"),
        "early": replace(SHORT, layers="early"),
    },
    # 4b: at about equal time, of all that two writers have written
    "time": {
        "late, four times": replace(BASE, study=100.0, writers=2),
        "uniform, twice": replace(BASE, study=100.0, writers=2, epochs=2, layers="uniform", sizes=(11, 11)),
    },
    # 9, in part: the fetched size under one anchor
    "sizes": {f"{n} and {n}": replace(BASE, sizes=(n, n)) for n in (8, 32, 128)},
    # 10: study at about the same number of learnt tokens
    "study": {
        "2": replace(BASE, study=2.0, epochs=10),
        "5": BASE,
        "two writers": replace(BASE, study=100.0, writers=2, epochs=2),
    },
    # 12: what study is made of, at equal size. All forms are half questions, the rest statements, chats, retellings
    "forms": {
        "all forms": replace(SHORT, writers=2, epochs=2),
        "questions and retellings 1:1": replace(SHORT, writers=2, epochs=2, forms=("question", "text")),
        "questions": replace(SHORT, writers=2, epochs=2, forms=("question",)),
    },
    # 3c, 3d, 10a: the demo's bank with fewer passages, seven a leaf, or with less study. They are asked the
    # questions of the report. The bank of `make vital` has the study of three writers
    "whole": {
        "480 passages": DEMO,
        "60 passages": replace(DEMO, passages=60, first=420, branching=3),
        "60 passages, large": replace(DEMO, passages=60, first=420, branching=3, sizes=(64, 64)),  # `vital-large`
        "240 passages": replace(DEMO, passages=240, first=240, branching=6),
        "2 characters": replace(DEMO, study=2.0),
        "5 characters": replace(DEMO, study=5.0),
        "11.6 characters": DEMO,
    },
    # 11: what each does to harm and to misrouted questions
    "harm": {
        "as it is": BASE,
        "amplitude 0.75": replace(BASE, amplitude=0.75),
        "amplitude 0.5": replace(BASE, amplitude=0.5),
        "5 % replay": replace(BASE, replay=0.05),
        "4 distractors": replace(BASE, distractors=4),
    },
}
HARMED = ("harm",)  # plans that ask misrouted and foreign questions too
