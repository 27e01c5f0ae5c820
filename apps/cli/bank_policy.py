"""The commands of `hiermem bank` that change a bank's policy and no block: block, unblock, reach."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import console

if TYPE_CHECKING:
    from mlx_hiermem.bank.policy import BankPolicy
    from mlx_hiermem.config import Path

NODES = "PATHS: nodes, such as 10 or 10.7. Each stands for all that is below it."


def block(
    words: list[str] = typer.Argument(None, metavar="[MODEL] PATHS...", help=NODES),
    model: str = models.MODEL,
    on_blocked: str | None = typer.Option(
        None,
        help="sibling or parent: a text whose nearest node is blocked goes to the nearest open one, or stops.",
    ),
) -> None:
    """Close nodes to every question. The bytes stay; `unblock` opens them again.

    Example: `hiermem bank block my-model 10 2.7`
    """
    from mlx_hiermem.bank import edit
    from mlx_hiermem.tree import ON_BLOCKED

    name, paths = models.split(words, model, models.is_no_number)
    if on_blocked not in (None, *ON_BLOCKED):
        raise typer.BadParameter("choose sibling or parent", param_hint="--on-blocked")
    if not paths and on_blocked is None:
        raise typer.BadParameter("name a node, or give --on-blocked", param_hint="PATHS")
    root = models.open_bank(name).root
    _print_policy(edit.block(root, parse_paths(paths), on_blocked))


def unblock(
    words: list[str] = typer.Argument(..., metavar="[MODEL] PATHS...", help=NODES), model: str = models.MODEL
) -> None:
    """Open nodes that were blocked, with all that is below them.

    Example: `hiermem bank unblock my-model 10`
    """
    from mlx_hiermem.bank import edit

    name, paths = nodes_named(words, model)
    root = models.open_bank(name).root
    _print_policy(edit.unblock(root, parse_paths(paths)))


def reach(
    words: list[str] = typer.Argument(
        None,
        metavar="[MODEL] [DISTANCE]",
        help="DISTANCE: the farthest that gets memory, as `route` shows it.",
    ),
    model: str = models.MODEL,
    off: bool = typer.Option(False, "--off", help="Every text gets the memory that is nearest to it."),
) -> None:
    """Show or set how far from what the bank knows a text may be and still get memory.

    Example: `hiermem bank reach my-model 1.2`
    """
    from mlx_hiermem.bank import edit

    name, numbers = models.split(words, model, models.is_no_number)
    distance = _distance(numbers)
    if off and distance is not None:
        raise typer.BadParameter("give a distance or --off", param_hint="--off")
    bank = models.open_bank(name)
    policy = bank.policy
    if off or distance is not None:
        policy = edit.reach(bank.root, math.inf if distance is None else distance)
    by_passages = bank.sources is not None and policy.passage_reach < math.inf
    far, what = policy.measured_by(by_passages), "the nearest passage" if by_passages else "its leaf"
    if far == math.inf:
        console.print("reach    any text gets the memory nearest to it")
    else:
        console.print(f"reach    {far:.3f}: a text farther than that from {what} gets no memory")


def nodes_named(words: list[str], model: str) -> tuple[str, list[str]]:
    """The model and the nodes of a command that needs one node at least."""
    name, paths = models.split(words, model, models.is_no_number)
    if not paths:
        raise typer.BadParameter("name a node, such as 10.7", param_hint="PATHS")
    return name, paths


def parse_paths(paths: list[str]) -> list[Path]:
    from mlx_hiermem.config import Path

    return [Path.parse(path) for path in paths]


def _distance(words: list[str]) -> float | None:
    try:
        (distance,) = map(float, words or ["nan"])
    except ValueError as error:
        raise typer.BadParameter("give one number", param_hint="DISTANCE") from error
    return None if math.isnan(distance) else distance


def _print_policy(policy: BankPolicy) -> None:
    nodes = ", ".join(map(str, sorted(policy.blocked))) or "nothing"
    goes = {"sibling": "go to the nearest open sibling", "parent": "stop at the parent"}
    console.print(f"blocked  {nodes}", markup=False)
    if policy.blocked:
        console.print(f"Their texts {goes[policy.on_blocked]}.", style="dim")
