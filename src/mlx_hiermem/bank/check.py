"""Whether a bank is whole: digests, and what they do not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mlx_hiermem.bank.bank import TREE, MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.commit import interrupted
from mlx_hiermem.bank.receipt import absent
from mlx_hiermem.bank.sources import INDEX_FILE, WINDOWS_FILE
from mlx_hiermem.errors import BankError
from mlx_hiermem.files import file_digest


def check(bank: MemoryBank, progress: Callable[[int, int], None] | None = None) -> Iterator[str]:
    """Yields one line for each thing that is wrong; `progress` gets (bytes checked, bytes in all).

    Beside every file's size and digest: an interrupted change, a policy that cannot be kept to, blocks whose
    node the tree lacks, and block files that the manifest does not know.
    """
    yield from bank.problems(progress)
    yield from beside_the_digests(bank)


def beside_the_digests(bank: MemoryBank) -> Iterator[str]:
    """What `check` finds in a bank whose files are all the manifest's."""
    bank = MemoryBank(bank.root, bank.manifest, verify=False)  # a tree that was found changed is looked at even so
    if line := interrupted(bank.root):
        yield line
    try:
        _ = bank.policy  # reads it, and the tree
    except BankError as error:
        yield error.what
    else:
        for node in bank.manifest.blocks:
            if not bank.tree.has(node):
                yield f"block {node} has no node in the tree"
    try:
        yield from absent(bank)
    except BankError as error:
        yield error.what
    if bank.manifest.sources is None and (bank.root / WINDOWS_FILE).exists():
        yield f"{WINDOWS_FILE} is not in the manifest"
    known = {block_name(node) for node in bank.manifest.blocks}
    for file in sorted((bank.root / "blocks").rglob("*.safetensors")):
        if (name := file.relative_to(bank.root).as_posix()) not in known:
            yield f"{name} is not in the manifest"


def require_tree(bank: MemoryBank) -> None:
    """Raises BankError unless the tree is the manifest's: a damaged one must not get a new digest."""
    file = bank.root / TREE
    if not file.is_file() or file_digest(file) != bank.manifest.tree.sha256:
        raise BankError(f"{file} is not the manifest's", "See `hiermem bank verify`; fetch or convert it again.")


def require_whole(bank: MemoryBank) -> None:
    """Raises BankError unless another bank can be made from this one: all blocks here, no change half made."""
    if line := interrupted(bank.root):
        raise BankError(f"{bank.root}: {line}")
    left = () if bank.sources else (WINDOWS_FILE, INDEX_FILE)  # a bank may have been pulled without
    files = [bank.root / name for name, _, _ in bank.files() if name not in left]
    if missing := [file for file in files if not file.is_file()]:
        raise BankError(
            f"{len(missing)} files of the bank are not here, such as {missing[0]}", "Pull or convert it whole."
        )
    require_tree(bank)
