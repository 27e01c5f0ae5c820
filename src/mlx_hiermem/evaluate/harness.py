"""lm-evaluation-harness with a memory for each example: any of its tasks, by name or YAML file.

Its requests do not say which part of their context is the example's own, so the tasks are asked again: an example
is routed by its question, never by the few-shot examples before it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM, TemplateLM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from mlx_hiermem.errors import TaskError
from mlx_hiermem.evaluate.encoding import EncodedPrompt, Prompter
from mlx_hiermem.evaluate.examples import ROLLING_WINDOW, SEED, Example, rolling_windows, shared_beginning
from mlx_hiermem.evaluate.generation import Asked, replies
from mlx_hiermem.evaluate.routes import Placed, attach, by_memory, place
from mlx_hiermem.evaluate.scoring import Pair, Score, Scorer
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.source_search import text_with

REPLY = 256  # tokens of a reply where the task does not say: the harness's default


class MemoryLM(TemplateLM):
    """A model as the harness asks it. `tasks` are those whose requests it will get, by name."""

    def __init__(self, model: MemoryModel, memory: str, tasks: dict[str, Task]) -> None:
        super().__init__()
        self.model, self.memory, self.tasks = model, memory, tasks
        self.prompter, self.scorer = Prompter(model), Scorer(model)
        self.tokenizer = model.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.prompter.first

    @property
    def max_length(self) -> int:
        return self.model.context or ROLLING_WINDOW

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.prompter.plain(string) if add_special_tokens is False else self.prompter.special(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        placed = self._place([self.question(request) for request in requests])
        pairs = []
        for request, where in zip(requests, placed, strict=True):
            context, continuation = request.args
            pairs.append([self._pair(text_with(context, where.chosen.passage), continuation)])
        scores = self._score(placed, pairs)
        return [(-one.nll, one.greedy) for (one,) in scores]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("tokens alone do not say which memory is meant; ask `loglikelihood`")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        size = min(ROLLING_WINDOW, self.max_length)
        pairs = [rolling_windows(self.prompter.plain(text), self.prompter.first, size) for text in texts]
        return [-sum(score.nll for score in scores) for scores in self._score(self._place(texts), pairs)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy; raises TaskError where a task wants sampling."""
        placed = self._place([self.question(request) for request in requests])
        asked, stops = [], []
        for request, where in zip(requests, placed, strict=True):
            context, settings = request.args
            if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                raise TaskError(f"task {request.task_name} samples its replies", "Only greedy replies are scored.")
            until = settings.get("until") or []
            stops.append([until] if isinstance(until, str) else list(until))
            longest = int(settings.get("max_gen_toks", REPLY))
            prompt = EncodedPrompt(((self.tok_encode(text_with(context, where.chosen.passage)), []),), longest)
            tokens = prompt.cut(self.max_length).pairs[0][0]
            asked.append(Asked(tokens, where.chosen, longest, partial(_ends, stops=stops[-1])))
        said = dict(replies(self.model, asked, self.prompter.decode))
        return [_cut(said[n], stops[n]) for n in range(len(requests))]

    def question(self, request: Instance) -> str:
        """The text that routes a request: the question, or what all choices have in common where it has several."""
        task, doc = self.tasks[str(request.task_name)], request.doc
        text = task.doc_to_text(doc)
        if isinstance(text, str) and text.strip():
            return text
        if not isinstance(text, int):  # no question: language modelling by a task of another form
            return str(request.args[0])
        words = [
            str(choice).split() for choice in task.doc_to_choice(doc)
        ]  # WinoGrande's form: contexts as choices
        return " ".join([*words[0][: shared_beginning(words)], str(task.doc_to_target(doc))])

    def _pair(self, context: str, continuation: str) -> Pair:
        """As the harness tokenises them, cut on the left to what the model takes."""
        if context:
            pair = self._encode_pair(context, continuation)
        else:
            pair = [self.prompter.first], self.prompter.plain(continuation)
        return EncodedPrompt((pair,)).cut(self.max_length + 1).pairs[0]

    def _place(self, texts: Sequence[str]) -> list[Placed]:
        examples = [Example(str(number), number, text) for number, text in enumerate(texts)]
        return place(self.model, examples, self.memory)

    def _score(self, places: Sequence[Placed], pairs: Sequence[Sequence[Pair]]) -> list[list[Score]]:
        """Scores of each request's pairs under its memory."""
        placed = dict(enumerate(places))
        found: dict[int, list[Score]] = {}
        for group in by_memory(placed).values():
            attach(self.model, placed[group[0]])
            for batch in self.scorer.score([pairs[n] for n in group]):
                found |= {group[i]: scores for i, scores in batch}
        return [found[n] for n in range(len(places))]


def run_harness(
    model: MemoryModel,
    memory: str,
    names: Sequence[str],
    limit: int | None = None,
    shots: int | None = None,
    use_cache: pathlib.Path | None = None,
) -> dict[str, Any]:
    """The harness's results: `results` by task, with standard errors, and `samples`. A YAML file's task is one too.

    Requests that were answered are kept in `use_cache` and not asked again. Raises TaskError for unknown names.
    """
    folders = {str(pathlib.Path(name).resolve().parent) for name in names if _is_yaml(name)}
    by_name = any(not _is_yaml(name) for name in names)  # else there is no need to read thousands of YAML files
    manager = TaskManager(include_path=sorted(folders) or None, include_defaults=by_name)
    try:
        loaded = manager.load(list(names))
    except (KeyError, ValueError, OSError) as error:
        raise TaskError(f"lm-evaluation-harness has no task {', '.join(names)}: {error}") from error
    for task in loaded["tasks"].values():
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED)
    lm: Any = MemoryLM(model, memory, dict(loaded["tasks"]))
    if use_cache:
        lm = CachingLM(lm, str(use_cache))
    # Not simple_evaluate, which describes the machine at length and wants PyTorch for it.
    found = evaluate(lm, loaded, limit=limit, bootstrap_iters=1000)
    assert found is not None  # that is for other ranks
    return dict(found)


def _is_yaml(name: str) -> bool:
    return pathlib.Path(name).suffix in (".yaml", ".yml")


def _ends(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
