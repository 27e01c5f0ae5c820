"""Whether a draft model would pay: tokens it gets right, what checking them costs, whether replies stay the same.

    python benchmarks/draft.py      # the demo's model, with itself as the draft, in float32 and in 4 bits; minutes

mlx-lm's own `speculative_generate_step`. The memory is attached to the target alone, so the draft guesses without
it. There are no smaller weights here than the target's, so no speed is measured. What is measured says how cheap a
draft must be: with T tokens a pass, and a pass over k drafted tokens that takes V times a single token's, a draft
pays where its token takes less than (T - V) / k of the target's.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import common
import mlx.core as mx
import mlx.nn as nn
from knowledge import read_learnt
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from mlx_hiermem import load
from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.apps.demo.tour import model_folder
from mlx_hiermem.model import MemoryModel

VITAL = pathlib.Path(__file__).parents[1] / "apps" / "demo" / "vital"
TEXTS = (  # what the bank knows nothing of
    "The first thing to do when you bake bread is",
    "In the morning she opened the window and",
    "A good way to learn a language is",
    "The river runs through the valley and",
)
DRAFTED = (1, 2, 3, 4)  # tokens of a pass
USED = 3  # of these, where replies are generated; mlx-lm's default
LENGTH = 12  # tokens of a reply
BEFORE = 64  # tokens in the cache where a pass is timed


def questions(count: int) -> list[str]:
    """Questions that the bank has learnt, in its frame, spread over its documents."""
    rows = read_learnt(VITAL / "study.jsonl.gz")
    return [f"Question: {row['question']}\nAnswer:" for row in rows[:: max(1, len(rows) // count)]][:count]


def until_end(tokens: Iterator[Any], model: MemoryModel) -> list[Any]:
    """What a generator yields, as far as the end of the text."""
    found = []
    for one in tokens:
        found.append(one)
        if int(one[0]) in model.tokenizer.eos_token_ids:
            break
    return found


def reply(model: MemoryModel, draft: nn.Module, prompt: str, memory: str) -> dict[str, Any]:
    """One greedy reply in both ways, with the passes over the target that drafting took."""
    model.select(memory, prompt)
    tokens = mx.array(model.tokens(prompt))
    plain = [int(one[0]) for one in until_end(generate_step(tokens, model.anchor, max_tokens=LENGTH), model)]
    made = speculative_generate_step(tokens, model.anchor, draft, num_draft_tokens=USED, max_tokens=LENGTH)
    found = until_end(made, model)
    passes = sum(not drafted for _, _, drafted in found) + bool(found[-1][2])
    return {
        "prompt": prompt,
        "same": [int(token) for token, _, _ in found] == plain,
        "tokens": len(found),
        "passes": passes,
    }


def replies(model: MemoryModel, draft: nn.Module, prompts: list[str], memory: str) -> dict[str, Any]:
    found = [reply(model, draft, prompt, memory) for prompt in prompts]
    tokens, passes = (sum(one[key] for one in found) for key in ("tokens", "passes"))
    same = sum(one["same"] for one in found)
    return {"same": f"{same} of {len(found)}", "tokens_a_pass": tokens / passes, "replies": found}


def passes(model: MemoryModel, runs: int) -> dict[str, Any]:
    """How long the target takes for a token and so many drafted ones, against one token."""
    cache = make_prompt_cache(model.anchor)
    model.anchor(mx.arange(1, BEFORE + 1)[None], cache=cache)

    def one(count: int) -> Callable[[], None]:
        def run() -> None:
            mx.eval(model.anchor(mx.ones((1, count), mx.int32), cache=cache))
            trim_prompt_cache(cache, count)

        return run

    sides = {str(count): one(1 + count) for count in (0, *DRAFTED)}
    return common.compared(common.turns(sides, runs), "0")


def main() -> None:
    parser = common.options(__doc__, runs=7, quick=2)
    parser.add_argument("--prompts", type=int, help="questions of each kind; default 16, quick 2")
    parser.add_argument("--model", type=pathlib.Path, help="a model folder; default: the demo's")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    folder, count = asked.model or model_folder(), asked.prompts or (2 if asked.quick else 16)
    model = load(folder)
    drafts = {"itself": load_anchor(folder / "anchor")[0], "itself in 4 bits": load_anchor(folder / "anchor")[0]}
    nn.quantize(drafts["itself in 4 bits"], 32, 4)
    model.select("fetched", questions(1)[0])
    timed = passes(model, asked.runs)
    kinds = {
        "of the bank, with memory": (questions(count), "fetched"),
        "of other things, without": (TEXTS[:count], "none"),
    }
    found = {
        name: {kind: replies(model, draft, list(prompts), memory) for kind, (prompts, memory) in kinds.items()}
        for name, draft in drafts.items()
    }
    result = {"drafted": USED, "length": LENGTH, "passes": timed, "drafts": found}
    common.save(__file__, result, asked, before)
    rows = [
        [name, common.around(side["wall_ratio"]), common.around(side["cpu_ratio"])] for name, side in timed.items()
    ]
    common.table(("drafted tokens in a pass", "time, to one token's", "by CPU time"), rows)
    print()
    verify = timed[str(USED)]["cpu_ratio"]["median"]
    rows = [
        [name, kind, one["same"], f"{one['tokens_a_pass']:.2f}", f"{(one['tokens_a_pass'] - verify) / USED:.2f}"]
        for name, sides in found.items()
        for kind, one in sides.items()
    ]
    common.table(("draft", "prompts", "same replies", "tokens a pass", "pays below"), rows)


if __name__ == "__main__":
    main()
