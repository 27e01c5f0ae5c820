"""Whether a bank is whole: digests, and what they do not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.commit import interrupted
from mlx_hiermem.errors import BankError


def check(bank: MemoryBank, progress: Callable[[int, int], None] | None = None) -> Iterator[str]:
    """Yields one line for each thing that is wrong; `progress` gets (bytes checked, bytes in all).

    Beside every file's size and digest: an interrupted change, a policy that cannot be kept to, blocks whose
    node the tree lacks, and block files that the manifest does not know.
    """
    yield from bank.problems(progress)
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
    known = {block_name(node) for node in bank.manifest.blocks}
    for file in sorted((bank.root / "blocks").rglob("*.safetensors")):
        if (name := file.relative_to(bank.root).as_posix()) not in known:
            yield f"{name} is not in the manifest"
