"""A model folder, or a bank beside the model of its anchor, opened: `load`.

model = load("my-model")  # a folder, or org/name on the hub
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from mlx_hiermem.anchor import identify, load_anchor
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.errors import AnchorError, ArgumentError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.share.resolve import resolve


def load(
    folder: str | pathlib.Path,
    *,
    cache_bytes: int = 512 << 20,
    beside: Iterable[MemoryModel] = (),
    verify: bool | None = None,
) -> MemoryModel:
    """Opens a memory model (`anchor/` and `bank/`), or a plain mlx-lm folder without memory, by folder or hub id.

    Where one of the models `beside` has the same anchor in memory, that is used; `folder` may then be a bank alone.
    `verify` has each file of the bank checked when it is first read; by default so, unless HIERMEM_VERIFY is 0.
    Raises AnchorError, BankError, HubError, or AnchorMismatchError where the bank was made for another anchor.
    """
    if not isinstance(folder, str | pathlib.Path):
        raise ArgumentError(f"{folder!r} is no model", "Give a folder, or org/name on the hub.")
    name = str(folder) if isinstance(folder, str) and not pathlib.Path(folder).is_dir() else ""
    folder = resolve(folder)
    anchor_folder = folder / "anchor" if (folder / "anchor").is_dir() else folder
    if (folder / MANIFEST).is_file():
        return _bank_alone(MemoryBank.open(folder, verify), name or folder.resolve().name, cache_bytes, beside)
    bank = MemoryBank.open(folder / "bank", verify) if (folder / "bank").is_dir() else None
    if bank and bank.remote and anchor_folder == folder:
        bring = f"hiermem bank pull {bank.remote.origin.repo} {folder} --lazy"
        raise AnchorError(f"{folder} was pulled without its anchor", f"`{bring}` brings it.")
    identity, name = identify(anchor_folder), name or folder.resolve().name
    if bank:
        bank.manifest.check_anchor(identity)
    beside = list(beside)
    for other in beside:
        if (
            other.identity
            and other.identity.is_same(identity)
            and (made := _beside(other, bank, name, cache_bytes))
        ):
            return _sharing(made, beside)
    anchor, tokenizer, config = load_anchor(anchor_folder)
    return MemoryModel(anchor, tokenizer, config, bank, cache_bytes=cache_bytes, name=name, identity=identity)


def _bank_alone(bank: MemoryBank, name: str, cache_bytes: int, beside: Iterable[MemoryModel]) -> MemoryModel:
    beside = list(beside)
    for other in beside:
        if made := _beside(other, bank, name, cache_bytes):
            return _sharing(made, beside)
    raise AnchorError(
        f"{bank.root} is a bank without its anchor, {bank.manifest.anchor.name}",
        "Give the folder of a model, or load the bank beside a model of that anchor.",
    )


def _beside(other: MemoryModel, bank: MemoryBank | None, name: str, cache_bytes: int) -> MemoryModel | None:
    """A model of another one's anchor, which stays in memory once, with another bank.

    None where that cannot be: another anchor, or a memory of another kind or for other layers.
    """
    if bank is not None:
        if other.identity is None or not other.identity.is_same(bank.manifest.anchor):
            return None
        if other.attachment is not None and not other.attachment.takes(bank.config):
            return None
    made = MemoryModel(
        other.anchor, other.tokenizer, other.config, bank, None, cache_bytes, name, other.identity, other.attachment
    )
    return made


def _sharing(made: MemoryModel, beside: Iterable[MemoryModel]) -> MemoryModel:
    """Tells all models of its anchor of what it has attached there: one without a bank must take that off."""
    for other in beside:
        if other.anchor is made.anchor:
            other.attachment = other.attachment or made.attachment
    return made
