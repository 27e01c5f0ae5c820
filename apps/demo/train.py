"""Training of the elements bank: only the memory moves, only the top of the anchor runs.

The anchor is frozen and memory sits in its last layers, so the hidden states that
enter the first memory layer never change: they are computed once per text and kept.
The system prompt that opens every chat text is run once per memory, not per text.

A step takes a few groups of sequences; all of a group go through one leaf's blocks.
Loss is on the answers alone, and logits are computed nowhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_hiermem.apps.demo.anchor import Anchor, Memory, run_layers
from mlx_hiermem.apps.demo.wordings import Wording

SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Settings:
    """What decides the result: a partial run is taken up only where all of it is the same."""

    branching: int = 4
    block_sizes: tuple[int, ...] = (24, 8)
    first_layer: int = 20
    epochs: int = 4
    groups: int = 4  # memories in one step
    group_size: int = 8  # sequences on each
    rate: float = 6e-3
    final_rate: float = 0.05  # of `rate`
    warm_up: int = 40  # steps
    weight_decay: float = 1e-3
    seed: int = 0

    @property
    def leaves(self) -> int:
        return self.branching ** len(self.block_sizes)


@dataclass(frozen=True)
class Text:
    """One training text, ready for the memory layers."""

    subject: str
    chat: bool
    hidden: Tensor  # [length, hidden]: what enters the first memory layer
    targets: Tensor  # [length]: next token where it belongs to the answer, -100 elsewhere


@dataclass(frozen=True)
class Batch:
    chat: bool
    leaves: list[int]  # one memory per group; the number after the last leaf is the generic block
    texts: list[Text]  # group by group


def chat_parts(anchor: Anchor, message: str) -> tuple[list[int], list[int]]:
    """Tokens of the system turn (the same for all) and of the user turn up to the assistant's reply."""
    mark = "\0"
    whole = anchor.tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    )
    system, rest = whole.split("<|im_start|>user", 1)
    rest = "<|im_start|>user" + rest.replace(mark, message)
    return anchor.tokenizer.encode(system), anchor.tokenizer.encode(rest)


@torch.no_grad()
def run_trunk(
    anchor: Anchor, wordings: list[Wording], first_layer: int, tick: Callable[[int], None]
) -> tuple[list[Text], Tensor]:
    """Every text through the layers below the memory, and the same for the system turn of chats."""
    trunk = range(first_layer)
    system = torch.tensor([chat_parts(anchor, "")[0]])
    prefix, prefix_kv = run_layers(anchor, anchor.embed(system), trunk)
    tokens: list[list[int]] = []
    starts: list[int] = []
    for w in wordings:
        prompt = chat_parts(anchor, w.prompt)[1] if w.chat else anchor.tokenizer.encode(w.prompt)
        end = [anchor.tokenizer.eos_token_id] if w.chat else []
        tokens.append(prompt + anchor.tokenizer.encode(w.answer) + end)
        starts.append(len(prompt))
    texts: list[Text | None] = [None] * len(wordings)
    order = sorted(range(len(wordings)), key=lambda i: (wordings[i].chat, len(tokens[i])))
    for batch in _runs(order, 32, lambda i: wordings[i].chat):
        chat = wordings[batch[0]].chat
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens[i][:-1]) for i in batch], batch_first=True)
        hidden, _ = run_layers(anchor, anchor.embed(ids), trunk, past=prefix_kv if chat else None)
        for row, i in enumerate(batch):
            targets = torch.tensor(tokens[i][1:])
            targets[: starts[i] - 1] = -100
            texts[i] = Text(wordings[i].subject, chat, hidden[row, : len(targets)].clone(), targets)
        tick(len(batch))
    return [t for t in texts if t is not None], prefix


def _runs(order: list[int], size: int, key: Callable[[int], bool]) -> Iterator[list[int]]:
    """Pieces of at most `size` that do not mix keys."""
    for value in (False, True):
        same = [i for i in order if key(i) == value]
        yield from (same[s : s + size] for s in range(0, len(same), size))


class Bank:
    """The trainable blocks, under the names and in the shapes of the memory checkpoint."""

    def __init__(self, settings: Settings, layers: int, hidden: int) -> None:
        self.settings = settings
        generator = torch.Generator().manual_seed(settings.seed)
        self.tensors: dict[str, Tensor] = {}
        shapes = {
            f"level{level}": (settings.branching**level, layers, r, hidden)
            for level, r in enumerate(settings.block_sizes, 1)
        }
        shapes["generic"] = (1, layers, sum(settings.block_sizes), hidden)
        for name, shape in shapes.items():
            for part in ("w1", "w2", "w3"):
                weight = torch.zeros(shape)
                if part != "w3":  # zeros in w3: the anchor starts out unchanged
                    torch.nn.init.trunc_normal_(weight, std=hidden**-0.5, generator=generator)
                self.tensors[f"memory.{name}.{part}"] = weight.requires_grad_()

    def fetch(self, leaves: list[int]) -> Memory:
        """The path's blocks of each leaf, joined; [groups, layers, R, hidden] three times."""
        return self._part("w1", leaves), self._part("w2", leaves), self._part("w3", leaves)

    def _part(self, part: str, leaves: list[int]) -> Tensor:
        k, depth = self.settings.branching, len(self.settings.block_sizes)
        rows = []
        for leaf in leaves:
            if leaf == self.settings.leaves:
                rows.append(self.tensors[f"memory.generic.{part}"][0])
                continue
            path = [self.tensors[f"memory.level{n}.{part}"][leaf // k ** (depth - n)] for n in range(1, depth + 1)]
            rows.append(torch.cat(path, 1))
        return torch.stack(rows)


def plan_epoch(texts: list[Text], where: dict[str, list[int]], settings: Settings, epoch: int) -> list[Batch]:
    """Every text once in every leaf of its subject, and the generic block as busy as one leaf.

    Groups hold texts of like length, batches hold groups of like length; the order of batches is random.
    """
    rng = np.random.default_rng((settings.seed, epoch))
    batches: list[Batch] = []
    for chat in (False, True):
        jobs: list[list[Text]] = [[] for _ in range(settings.leaves + 1)]
        for text in texts:
            if text.chat == chat:
                for leaf in where[text.subject]:
                    jobs[leaf].append(text)
        everything = [t for leaf in jobs for t in leaf]
        for i in rng.permutation(len(everything))[: len(everything) // settings.leaves]:
            jobs[-1].append(everything[i])
        groups: list[tuple[float, int, list[Text]]] = []
        for leaf, own in enumerate(jobs):
            own = sorted(own, key=lambda t: len(t.targets) + rng.random())
            own += [own[i] for i in rng.integers(len(own), size=-len(own) % settings.group_size)]
            for s in range(0, len(own), settings.group_size):
                group = own[s : s + settings.group_size]
                groups.append((max(len(t.targets) for t in group) + rng.random(), leaf, group))
        groups.sort(key=lambda g: g[0])
        for s in range(0, len(groups), settings.groups):
            part = groups[s : s + settings.groups]
            batches.append(Batch(chat, [g[1] for g in part], [t for g in part for t in g[2]]))
    return [batches[i] for i in rng.permutation(len(batches))]


def batch_loss(anchor: Anchor, bank: Bank, batch: Batch, prefix: Tensor, first_layer: int) -> tuple[Tensor, float]:
    """Mean cross-entropy over answer tokens, and the share of them that is the most likely one."""
    top = range(first_layer, anchor.layers)
    memory = bank.fetch(batch.leaves)
    past = None
    if batch.chat:
        _, past = run_layers(anchor, prefix.expand(len(batch.leaves), -1, -1), top, memory=memory)
    x = torch.nn.utils.rnn.pad_sequence([t.hidden for t in batch.texts], batch_first=True)
    targets = torch.nn.utils.rnn.pad_sequence([t.targets for t in batch.texts], True, -100)
    x, _ = run_layers(anchor, x, top, past=past, memory=memory)
    answer = targets != -100
    logits = anchor.logits(x[answer])
    right = (logits.argmax(-1) == targets[answer]).float().mean()
    return F.cross_entropy(logits, targets[answer]), float(right)


@dataclass
class Progress:
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    right: float = 0.0
    wall: float = 0.0  # seconds of training, over all resumed parts
    cpu: float = 0.0


def train(
    anchor: Anchor,
    bank: Bank,
    texts: list[Text],
    prefix: Tensor,
    where: dict[str, list[int]],
    partial: Path,
    made_of: str,
    tick: Callable[[Progress], None],
) -> Progress:
    """All epochs, from the partial checkpoint on if one of the same settings and data (`made_of`) exists."""
    settings = bank.settings
    parameters = list(bank.tensors.values())
    optimiser = torch.optim.AdamW(
        parameters, lr=settings.rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    plan = [batch for epoch in range(settings.epochs) for batch in plan_epoch(texts, where, settings, epoch)]
    state = resume(partial, bank, optimiser, made_of)
    state.steps = len(plan)
    wall, cpu = time.perf_counter() - state.wall, time.process_time() - state.cpu
    while state.step < state.steps:
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * _schedule(state.step, state.steps, settings)
        loss, right = batch_loss(anchor, bank, plan[state.step], prefix, settings.first_layer)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        blend = min(0.98, state.step / (state.step + 1))  # a running mean that forgets after about 50 steps
        state.loss = blend * state.loss + (1 - blend) * loss.item()
        state.right = blend * state.right + (1 - blend) * right
        state.step += 1
        state.wall, state.cpu = time.perf_counter() - wall, time.process_time() - cpu
        if state.step % SAVE_EVERY == 0 or state.step == state.steps:
            save_partial(partial, bank, optimiser, state, made_of)
        tick(state)
    return state


def _schedule(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to `final_rate`."""
    if step < settings.warm_up:
        return (step + 1) / settings.warm_up
    done = (step - settings.warm_up) / max(1, steps - settings.warm_up)
    return settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def save_partial(path: Path, bank: Bank, optimiser: torch.optim.Optimizer, state: Progress, made_of: str) -> None:
    """Everything needed to go on, written beside and renamed so that a crash leaves a whole file."""
    beside = path.with_suffix(".tmp")
    content = {
        "settings": asdict(bank.settings),
        "made_of": made_of,
        "tensors": bank.tensors,
        "optimiser": optimiser.state_dict(),
        "state": asdict(state),
    }
    torch.save(content, beside)
    beside.replace(path)


def resume(path: Path, bank: Bank, optimiser: torch.optim.Optimizer, made_of: str) -> Progress:
    """Load a partial run of the same settings and data into bank and optimiser; else a fresh start."""
    if not path.exists():
        return Progress()
    saved = torch.load(path, weights_only=True)
    if (saved["settings"], saved["made_of"]) != (asdict(bank.settings), made_of):
        return Progress()
    with torch.no_grad():
        for name, tensor in bank.tensors.items():
            tensor.copy_(saved["tensors"][name])
    optimiser.load_state_dict(saved["optimiser"])
    return Progress(**saved["state"])
