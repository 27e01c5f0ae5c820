"""What of mlx-lm we lean on and it does not promise. A failure names what of ours a new mlx-lm would break.

`_get_classes` is private, and so is what BatchGenerator calls on a cache. The other names are public, but mlx-lm
has renamed such ones between minor versions.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import operator
import pathlib
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, GenerationBatch
from mlx_lm.models.cache import KVCache, make_prompt_cache
from test_layers import FILES
from tiny import LLAMA, make_anchor

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.batch import _Rows
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.partial import PartialAnchor, repeat_cache

# what we call -> (the arguments that we give by name, who of ours does)
CALLS = {
    "utils:_get_classes": ("config", "anchor.model_classes"),
    "utils:load_model": ("lazy model_config get_model_classes", "anchor.load_anchor, convert.anchors"),
    "generate:BatchGenerator": (
        "max_tokens stop_tokens sampler completion_batch_size prefill_batch_size",
        "batch.MemoryBatch, learn.study.teacher.Teacher",
    ),
    "generate:BatchGenerator.insert": (
        "prompts max_tokens caches all_tokens samplers logits_processors",
        "batch.MemoryBatch.add, learn.study.teacher.Teacher",
    ),
    "generate:BatchGenerator.next": ("", "batch.MemoryBatch.step"),
    "generate:BatchGenerator.next_generated": ("", "learn.study.teacher.Teacher"),
    "generate:BatchGenerator.remove": ("uids", "batch.MemoryBatch.remove"),
    "generate:BatchGenerator.close": ("", "batch.MemoryBatch.close"),
    "generate:stream_generate": (
        "model tokenizer prompt max_tokens",
        "model.MemoryModel.responses",
    ),
    "generate:generate_step": (
        "sampler logits_processors prompt_cache kv_bits kv_group_size quantized_kv_start",
        "model.MemoryModel.responses",
    ),
    "models.cache:KVCache.to_quantized": ("group_size bits", "sampling"),
    "models.cache:LRUPromptCache": ("max_size max_bytes", "batch.MemoryBatch, session.Session"),
    "models.cache:LRUPromptCache.fetch_nearest_cache": ("model tokens", "batch.MemoryBatch, session.Session"),
    "models.cache:LRUPromptCache.insert_cache": ("model tokens prompt_cache", "batch.MemoryBatch, session.Session"),
    "models.cache:trim_prompt_cache": ("cache num_tokens", "session.Session"),
    "models.cache:KVCache.update_and_fetch": ("keys values", "partial.Documents, which stands in for it"),
    "sample_utils:apply_top_p": ("logprobs top_p", "sampling.Sampling"),
    "sample_utils:apply_min_p": ("logprobs min_p", "sampling.Sampling"),
    "sample_utils:apply_top_k": ("logprobs top_k", "sampling.Sampling"),
    "sample_utils:make_repetition_penalty": ("penalty", "sampling.Sampling"),
    "sample_utils:make_presence_penalty": ("penalty context_size", "sampling.Sampling"),
    "sample_utils:make_frequency_penalty": ("penalty context_size", "sampling.Sampling"),
    "sample_utils:make_logits_processors": ("logit_bias", "sampling.Sampling"),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_take_what_we_give(call: str) -> None:
    given, ours = CALLS[call]
    module, name = call.split(":")
    try:
        found = operator.attrgetter(name)(importlib.import_module(f"mlx_lm.{module}"))
    except (ImportError, AttributeError) as error:
        pytest.fail(f"mlx-lm no longer has {call}: mend {ours} ({error})")
    gone = set(given.split()) - set(inspect.signature(found).parameters)
    assert not gone, f"mlx-lm's {call} no longer takes {', '.join(gone)}: mend {ours}"


def names_taken() -> dict[tuple[str, str], str]:
    """(module of mlx-lm, name) -> a module of ours that imports it."""
    found = {}
    for ours, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlx_lm":
                found |= {(str(node.module), alias.name): ours for alias in node.names}
    return found


def test_every_name_that_we_import_is_there() -> None:
    taken = names_taken()
    assert ("mlx_lm.utils", "_get_classes") in taken  # the search finds something
    gone = [
        f"{module}.{name}, which {ours} imports"
        for (module, name), ours in taken.items()
        if not hasattr(importlib.import_module(module), name)
    ]
    assert not gone, f"mlx-lm no longer has {gone}"


def test_a_response_of_the_batch_has_what_we_read() -> None:
    fields = {field.name for field in dataclasses.fields(GenerationBatch.Response)}
    read = {"uid", "token", "logprobs", "finish_reason", "prompt_cache", "all_tokens"}
    assert read <= fields, f"mlx-lm's batch no longer reports {read - fields}: mend batch.MemoryBatch._token"


class Watched(_Rows):
    """The memory table's rows, noting what is asked of them that they do not have."""

    lacking: set[str] = set()  # noqa: RUF012  # one for all that the generator makes of the first

    def __getattr__(self, name: str) -> Any:
        self.lacking.add(name)
        raise AttributeError(name)


def test_rows_have_every_method_that_the_generator_calls(tmp_path: pathlib.Path) -> None:
    """Sequences of different lengths join while others decode; one is taken out, the rest end."""
    anchor = load_anchor(make_anchor(tmp_path / "anchor"))[0]
    seen = set()

    def model(tokens: mx.array, cache: list[Any]) -> mx.array:
        *own, rows = cache
        seen.update(rows.rows.tolist())
        assert rows.rows.shape == tokens.shape[:1]
        return anchor(tokens, cache=own)

    def insert(number: int, length: int) -> int:
        caches = [[*make_prompt_cache(anchor), Watched(mx.array([number]))]]
        return generator.insert([list(range(1, length + 1))], [6], caches=caches)[0]

    generator = BatchGenerator(model, completion_batch_size=4, prefill_batch_size=2, prefill_step_size=4)
    ended: dict[int, Any] = {}
    try:
        uids = [insert(0, 9), insert(1, 3)]
        generator.next()
        uids += [insert(2, 5), insert(3, 2)]
        for step in range(20):
            ended |= {r.uid: r for r in generator.next()[1] if r.finish_reason}
            if step == 3:
                generator.remove([uids[2]])
        generator.close()
    except Exception as error:
        pytest.fail(
            f"mlx-lm's BatchGenerator asks a cache for more than batch._Rows has "
            f"({sorted(Watched.lacking) or 'no name is missing'}): {type(error).__name__}: {error}"
        )
    assert seen == {0, 1, 2, 3}
    rows = {uid: r.prompt_cache[-1].rows.tolist() for uid, r in ended.items()}
    assert rows == {uids[i]: [i] for i in (0, 1, 3)}, "a row no longer stays with its sequence: mend batch._Rows"


def test_layers_can_be_entered(tmp_path: pathlib.Path) -> None:
    """partial.Anchor leans on `model.layers` and on how a model calls them and their caches."""
    PartialAnchor(load_anchor(make_anchor(tmp_path / "anchor"))[0]).check()


def test_a_cache_can_be_spread() -> None:
    """partial.repeat_cache sets `keys` and `values` of a KVCache to more rows of the same."""
    one = KVCache()
    one.update_and_fetch(mx.full((1, 2, 3, 4), 5), mx.full((1, 2, 3, 4), 6))
    keys, values = repeat_cache([one], 7)[0].update_and_fetch(mx.zeros((7, 2, 1, 4)), mx.zeros((7, 2, 1, 4)))
    for found, before in ((keys, 5), (values, 6)):
        assert found.shape == (7, 2, 4, 4), "mend partial.repeat_cache"
        assert found[:, 0, :, 0].tolist() == [[before] * 3 + [0]] * 7, "mend partial.repeat_cache"
    assert one.offset == 3, "mend partial.repeat_cache: it changes the cache that it was given"


@pytest.mark.parametrize(("kind", "file"), [("llama", "openlm.py"), ("openlm", "../else.py"), ("openlm", ["a"])])
def test_code_of_a_model_is_never_run(kind: str, file: Any, tmp_path: pathlib.Path) -> None:
    """Whatever mlx-lm does with `model_file`, an anchor that names one is refused before mlx-lm sees it."""
    folder = make_anchor(tmp_path / "anchor")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"model_type": kind, "model_file": file}))
    for name in ("anchor/openlm.py", "else.py"):
        (tmp_path / name).write_text("raise SystemExit('executed')")
    with pytest.raises(AnchorError, match="wants code to be run from its folder"):
        load_anchor(folder)


def test_mlx_lm_refuses_code_by_default(tmp_path: pathlib.Path) -> None:
    """`learn --teacher` loads by mlx-lm; 0.31 ran a hub model's code, which is why 0.32 is our floor."""
    from mlx_hiermem.learn.study.teacher import load_teacher

    folder = make_anchor(tmp_path / "anchor")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"model_file": "own.py"}))
    (folder / "own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(AnchorError, match="custom module"):
        load_teacher(str(folder))
