"""`hiermem bank`: look at a bank, check it, mend it, draw it. Commands that change a bank have their own files."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli import ask, bank_add, bank_copy, bank_hub, bank_policy, bank_remove, models
from mlx_hiermem.apps.cli.display import console, progress_bar, several, size
from mlx_hiermem.files import new_file
from mlx_hiermem.printable import printable

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.bank.repair import FolderCopy, HubCopy
    from mlx_hiermem.config import Path

STYLES = {"blocked": "red", "missing": "yellow", "remote": "dim", "on disk": ""}


def ls(
    words: list[str] = typer.Argument(
        None, metavar="[MODEL] [PATH]", help="PATH: only this node and what is below it, such as 10 or 10.7."
    ),
    model: str = models.MODEL,
    as_json: bool = typer.Option(False, "--json", help="Print a JSON list instead of a table."),
) -> None:
    """List the blocks: path, label, bytes, documents, and whether each is blocked or missing on disk.

    Example: `hiermem bank ls my-model 10`
    """
    from mlx_hiermem.config import ROOT, Path

    name, paths = models.split(words, model, models.is_no_number)
    if len(paths) > 1:
        raise typer.BadParameter("give one", param_hint="PATH")
    bank = models.open_bank(name)
    top = Path.parse(paths[0]) if paths else ROOT
    if top:
        bank.tree.check([top])
    blocks = [(node, entry) for node, entry in bank.manifest.blocks.items() if node[: len(top)] == top]
    if as_json:
        rows = [entry.to_json() | {"state": bank.state(node), "bits": _bits(bank, node)} for node, entry in blocks]
        console.print_json(json.dumps(rows, ensure_ascii=False))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim")
    table.add_column("path", no_wrap=True)
    table.add_column("label")
    for header in ("bytes", "documents"):
        table.add_column(header, justify="right", no_wrap=True)
    if bank.config.quantization:
        table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for node, entry in blocks:
        state = bank.state(node)
        cells = [size(entry.bytes), str(entry.documents or "")]
        cells += [str(_bits(bank, node))] if bank.config.quantization else []
        table.add_row(str(node), Text(entry.label), *cells, Text(state, STYLES[state]))
    console.print(table)
    console.print(_totals(bank, [node for node, _ in blocks]), style="dim", markup=False)


def show(
    first_word: str = models.FIRST_WORD,
    model: str = models.MODEL,
    depth: int = typer.Option(0, min=0, help="Show this many levels. 0: all."),
    png: pathlib.Path | None = typer.Option(None, help="Draw it into this PNG file (needs the extra `plots`)."),
    html: pathlib.Path | None = typer.Option(None, help="Draw it into this HTML file, which needs nothing else."),
) -> None:
    """Show the bank as a tree, or draw it: every block a rectangle, its area its bytes, its colour its state.

    Example: `hiermem bank show my-model --html bank.html`
    """
    name = models.chosen(first_word, model)
    bank = models.open_bank(name)
    if not (png or html):
        console.print(_tree(bank, depth))
        console.print(_totals(bank, list(bank.manifest.blocks)), style="dim", markup=False)
        return
    from mlx_hiermem.apps.picture.icicle import icicle

    picture = icicle(bank, models.folder_of(name).resolve().name, depth)
    if png:
        from mlx_hiermem.apps.picture.png import png as draw

        _save(png, draw(picture))
    if html:
        from mlx_hiermem.apps.picture.page import page

        _save(html, page(picture).encode())


def verify(
    first_word: str = models.FIRST_WORD,
    model: str = models.MODEL,
    as_json: bool = typer.Option(False, "--json", help="Print a JSON object instead of text."),
) -> None:
    """Check the size and digest of every file that is here, the policy, and that no change was interrupted.

    Exits with 1 where all is not well. What is still on the hub is counted; it is checked when it arrives.

    Example: `hiermem bank verify my-model`
    """
    from mlx_hiermem.bank.check import check
    from mlx_hiermem.bank.commit import interrupted
    from mlx_hiermem.errors import BankError

    bank = models.open_bank(models.chosen(first_word, model))
    with progress_bar("checking", show=not as_json) as progress:
        problems = list(check(bank, progress))
    here = [(bank.root / name).is_file() for name, _, _ in bank.files()]
    files, remote = sum(here), here.count(False) if bank.remote else 0
    if as_json:
        console.print_json(json.dumps({"files": files, "remote": remote, "problems": problems}, ensure_ascii=False))
    else:
        for problem in problems:
            console.print(printable(problem), style="red", markup=False, soft_wrap=True)
    if problems:
        mend = "`hiermem bank repair --from` mends it from another copy; or pull or convert the bank again."
        hint = "Make a change, then verify again." if interrupted(bank.root) else mend
        raise BankError(f"{several(len(problems), 'problem')} in {bank.root}", hint)
    if not as_json:
        on_hub = f"; {remote} more {'are' if remote > 1 else 'is'} on the hub" if remote else ""
        console.print(f"{several(files, 'file')}, all as the manifest says{on_hub}", markup=False)


def _tree(bank: MemoryBank, depth: int) -> Tree:
    """The nodes of the block table and those above them, down to level `depth`; 0 is all of them."""
    from rich.text import Text
    from rich.tree import Tree

    blocks = bank.manifest.blocks
    nodes = sorted({node for path in blocks for node in path.prefixes()})
    top = Tree(Text(bank.manifest.anchor.name, "bold"), guide_style="dim")
    branches: dict[Path, Tree] = {}
    for node in nodes:
        if not depth or len(node) <= depth:
            above = next((branches[up] for up in reversed(node.prefixes()[:-1])), top)
            branches[node] = above.add(_line(bank, node))
    return top


def _line(bank: MemoryBank, node: Path) -> Text:
    from rich.text import Text

    entry = bank.manifest.blocks.get(node)
    state = bank.state(node) if entry else "on disk"
    line = Text.assemble(
        (str(node), "dim"), " ", bank.manifest.label(node), "  ", (size(entry.bytes) if entry else "", "dim")
    )
    if state != "on disk":
        line.append(f"  {state}", STYLES[state])
    return line


def _bits(bank: MemoryBank, node: Path) -> int:
    """Bits of a value in a node's block, scales and biases not counted."""
    from mlx_hiermem.config import DTYPES

    how = bank.config.quantized(len(node))
    return how.bits if how else 8 * DTYPES[bank.config.dtype]


def _totals(bank: MemoryBank, nodes: list[Path]) -> str:
    """`11 blocks · 74.5 kB · float16 · 2 blocked: their texts go to the nearest open sibling`"""
    states = [bank.state(node) for node in nodes]
    parts = [several(len(nodes), "block")]
    parts.append(size(sum(bank.manifest.blocks[node].bytes for node in nodes)))
    parts.append(bank.config.precision)
    if kept := bank.manifest.sources:
        where = "" if bank.sources else ", on the hub"
        parts.append(f"{several(kept.windows, 'window')} of {several(kept.documents, 'document')}{where}")
    for state in ("remote", "missing", "blocked"):
        if count := states.count(state):
            parts.append(f"{count} {state}")
    if "blocked" in states:
        goes = {"sibling": "go to the nearest open sibling", "parent": "stop at the parent"}
        parts[-1] += f": their texts {goes[bank.policy.on_blocked]}"
    return " · ".join(parts)


def _save(file: pathlib.Path, data: bytes) -> None:
    with new_file(file) as partial:
        partial.write_bytes(data)
    console.print(f"written  {file}", markup=False, soft_wrap=True)


def repair(
    first_word: str = models.FIRST_WORD,
    model: str = models.MODEL,
    source: str = typer.Option(
        "", "--from", help="Another copy: a model, a bank's folder or a hub id. Default: where it was pulled from."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would come, and change nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Mend a bank from another copy: exactly the files that are missing, have changed or cannot be read.

    Only bytes with the digests of this bank's manifest are taken. Exits with 1 where something stays wrong.

    Example: `hiermem bank repair my-model --from /Volumes/backup/my-model`
    """
    from mlx_hiermem.bank.repair import repair as run
    from mlx_hiermem.errors import BankError

    bank = models.open_bank(models.chosen(first_word, model))
    other = _other_copy(source, bank)
    with progress_bar("checking", show=not as_json) as progress:
        repaired = run(bank.root, other, dry_run, progress)
    if as_json:
        console.print_json(json.dumps(repaired.to_json() | {"from": str(other), "dry_run": dry_run}))
    else:
        for name in repaired.mended:
            console.print(f"{'would mend' if dry_run else 'mended'}  {name}", markup=False, soft_wrap=True)
        for line in repaired.left:
            console.print(printable(line), style="red", markup=False, soft_wrap=True)
    if repaired.left:
        changed = "" if repaired.mended and not dry_run else " Nothing was changed."
        raise BankError(
            f"{several(len(repaired.left), 'problem')} left in {bank.root}.{changed}",
            "Name another copy with --from, or pull or convert the bank again.",
        )
    if not as_json:
        count = several(len(repaired.mended), "file")
        text = f"{count}, {size(repaired.bytes)}, from {other}" if repaired.mended else "nothing is damaged"
        console.print(text, markup=False, soft_wrap=True)


def _other_copy(source: str, bank: MemoryBank) -> FolderCopy | HubCopy:
    from mlx_hiermem.bank.repair import FolderCopy, HubCopy
    from mlx_hiermem.share.resolve import hub_id

    origin = bank.remote.origin if bank.remote else None
    if not source and not origin:
        raise typer.BadParameter("name another copy of the bank", param_hint="--from")
    folder = pathlib.Path(source)
    if source and folder.is_dir():
        return FolderCopy(models.bank_folder(folder))
    if origin and source in ("", origin.repo):
        return HubCopy(origin.repo, origin.revision)
    return HubCopy(*hub_id(source))


app = typer.Typer(
    help="Look at a bank, change it (block, remove, add, merge, quantize), and share it.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
for command in (
    ls,
    show,
    verify,
    repair,
    bank_policy.block,
    bank_policy.unblock,
    bank_policy.reach,
    bank_remove.remove,
    bank_add.add,
    bank_add.add_block,
    bank_copy.merge,
    bank_copy.quantize,
    bank_copy.export,
    bank_hub.push,
    bank_hub.pull,
):
    app.command()(command)
app.command("path", hidden=True)(ask.bank_path)
