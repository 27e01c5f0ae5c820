"""A model folder in, the folder that an app bundles out (`package.py` describes it): for Core ML and for Core AI.

Everything is made beside OUT and renamed at the end, after the saved package was run and held its bounds.
"""

from __future__ import annotations

import datetime
import pathlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from mlx_hiermem.anchor import identify
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.convert.coreml.compress import FORMATS, check_half
from mlx_hiermem.convert.export import bundle, package, sizes
from mlx_hiermem.convert.export.architecture import Architecture, Linear, check_memory
from mlx_hiermem.convert.export.bundle import Choice
from mlx_hiermem.convert.export.distance import Float32Anchor
from mlx_hiermem.convert.export.limits import BOUNDS, Measured, SavedAnchor, Trial
from mlx_hiermem.convert.export.mixed_precision import Codec, PrecisionPlan, find_plan
from mlx_hiermem.convert.export.references import read_memory
from mlx_hiermem.convert.export.shape import PREFILL_TOKENS, Export
from mlx_hiermem.convert.source import tool_versions
from mlx_hiermem.convert.staging import partial_folder
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.files import write_json
from mlx_hiermem.progress import Progress
from mlx_hiermem.router import load_embedder

CONTEXT = 1024
MODES = ("state", "input")


@dataclass(frozen=True)
class Options:
    """What the command can be told. `bound`: mean KL from the anchor; None is that of the weights' format."""

    context: int | None = None
    memory: str = "state"
    weights: str = "int8"
    bound: float | None = None
    blocks: str = "all"
    only: tuple[str, ...] = ()
    url: str = ""
    sources: bool = False

    def __post_init__(self) -> None:
        if self.memory not in MODES:
            raise HierMemError(f"--attach is '{self.memory}'", f"Choose {' or '.join(MODES)}.")
        if self.weights not in FORMATS:
            raise HierMemError(f"unknown weight format '{self.weights}'", f"Known: {', '.join(FORMATS)}.")
        if self.blocks not in bundle.BLOCKS:
            raise HierMemError(f"--blocks is '{self.blocks}'", f"Choose {' or '.join(bundle.BLOCKS)}.")


@dataclass(frozen=True)
class Report:
    """What was made: manifest and receipt as they were written, and what the user should know."""

    manifest: dict[str, Any]
    receipt: dict[str, Any]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Target(ABC):
    """What the folder is for: its formats, and how its packages are written and run."""

    format: str  # the manifest's
    anchor: str  # the packages' names in the folder
    retriever: str
    codec: Codec
    step = 1  # of a state's axes, see `Export`

    @abstractmethod
    def matrices(self, sizes: Architecture) -> list[Linear]:
        """The weights that may be compressed."""

    @abstractmethod
    def save(self, sizes: Architecture, shape: Export, formats: Mapping[str, str], package: pathlib.Path) -> None:
        """Writes the anchor."""

    @abstractmethod
    def describe(self, sizes: Architecture, shape: Export, formats: Mapping[str, str]) -> dict[str, Any]:
        """The manifest's `anchor`."""

    @abstractmethod
    def measure(self, saved: SavedAnchor, trial: Trial) -> Measured:
        """Runs the saved anchor."""

    @abstractmethod
    def save_retriever(self, embedder: Embedder, package: pathlib.Path, tokenizer: pathlib.Path) -> dict[str, Any]:
        """Writes the retriever; returns what the manifest says of it."""

    def warnings(self, sizes: Architecture, shape: Export, formats: Mapping[str, str]) -> Sequence[str]:
        """What the user should know of such an export."""
        return ()


def export_for(
    target: Target,
    model: pathlib.Path,
    out: pathlib.Path,
    options: Options | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> Report:
    """Writes the folder `out` from a model folder (anchor/ and bank/), or from a plain mlx-lm model without memory.

    Raises a HierMemError for a model that cannot be exported, OutputError where `out` exists or a file would be too
    large, CoreMLError where float16 would overflow, VerificationError where the bound is exceeded.
    """
    bundle.check_out(out)
    exporter = _Exporter(target, model, options or Options(), _Steps(progress), say)
    with partial_folder(out, resume=False, overwrite=True, keep=False) as partial:
        return exporter.write(partial, out)


class _Steps:
    """Counts what is done, for a progress bar. What there is to do may turn out to be more."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.done, self.total = progress, 0, 0

    def expect(self, count: int) -> None:
        self.total += count

    def did(self, count: int = 1) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)

    def within(self, done: int, total: int) -> None:
        """A part that counts for itself."""
        if done == 1:
            self.expect(total)
        self.did()


class _Exporter:
    """Reads the model and settles what is to be built; `write` builds it."""

    def __init__(
        self, target: Target, model: pathlib.Path, options: Options, steps: _Steps, say: Callable[[str], None]
    ) -> None:
        self.target, self.model, self.options, self.steps, self.say = target, model, options, steps, say
        self.anchor = model / "anchor" if (model / "anchor").is_dir() else model
        bank = MemoryBank.open(model / "bank") if (model / "bank").is_dir() else None
        self.choice: Choice | None = None
        if bank:
            bank.manifest.check_anchor(identify(self.anchor))
            self.choice = bundle.choose(bank, options.blocks, options.only, options.url, options.sources)
        self.say("reading the anchor, and running it on the texts that it is measured on")
        self.reference = Float32Anchor(self.anchor, longest=options.context or CONTEXT)
        longest = self.reference.sizes.longest or CONTEXT
        self.context = options.context or min(CONTEXT, longest)
        package.check_context(self.reference.sizes, self.context, PREFILL_TOKENS)
        if bank:
            check_memory(self.reference.sizes, bank.config)

    @property
    def bound(self) -> float:
        return BOUNDS[self.options.weights] if self.options.bound is None else self.options.bound

    @cached_property
    def shape(self) -> Export:
        if self.choice is None:
            return Export(self.context, step=self.target.step)
        config, mode = self.choice.bank.config, self.options.memory
        load_block, step = mode == "state", self.target.step
        return Export(self.context, config.layers, config.fetched_size, mode, load_block, step=step)

    def write(self, folder: pathlib.Path, out: pathlib.Path) -> Report:
        """Fills `folder`, which will become `out`."""
        reference, choice, target = self.reference, self.choice, self.target
        if choice:  # first, as what is wrong with a bank is found quickly
            self.say(f"checking {len(choice.bundled)} blocks")
            self.steps.expect(len(choice.bundled))
            bundle.write_bank(choice, folder / package.BANK, self.steps.did)
        weights = target.matrices(reference.sizes)
        for one in weights:
            check_half(one.name, one.weight)
        plan = find_plan(
            reference, weights, self.options.weights, self.bound, target.codec, self.steps.within, self.say
        )
        sizes.check_weights(
            sizes.weight_bytes(reference.sizes, self.shape, plan.formats, weights, target.codec.size), out
        )
        self.say("writing the anchor")
        target.save(reference.sizes, self.shape, plan.formats, folder / target.anchor)
        anchor = target.describe(reference.sizes, self.shape, plan.formats)
        memory = package.describe_memory(choice.bank.config, self.options.memory) if choice else None
        self.say("running what was written")
        measured = self._measure(folder, anchor, memory)
        measured.check(self.bound)
        retriever = self._write_retriever(choice, folder) if choice else None
        bundle.write_tokenizer(self.anchor, reference.tokenizer, folder / package.TOKENIZER)
        sizes.check_files(folder)
        manifest = {
            "format": target.format,
            "version": package.VERSION,
            "name": self.model.resolve().name,
            "anchor": anchor,
            "memory": memory,
            "retriever": retriever,
            **package.describe_text(
                self.anchor, reference.tokenizer, choice is not None and choice.bank.manifest.knows_questions
            ),
            "bank": choice.to_json() if choice else None,
            "files": package.file_table(folder),
        }
        write_json(folder / package.MANIFEST, manifest)
        devices = sizes.on_devices(folder)
        receipt = self._receipt(plan, measured, devices)
        write_json(folder / package.RECEIPT, receipt)
        warnings = [
            *reference.notes,
            *measured.overflow.warnings(),
            *target.warnings(reference.sizes, self.shape, plan.formats),
            *(choice.warnings() if choice else ()),
        ]
        warnings += sizes.warnings(devices)
        return Report(manifest, receipt, tuple(warnings))

    def _measure(self, folder: pathlib.Path, anchor: dict[str, Any], memory: dict[str, Any] | None) -> Measured:
        """With the first and the last of the longest paths whose blocks are bundled."""
        memories = {}
        if self.choice and self.choice.bundled:
            longest = max(len(entry.path) for entry in self.choice.bundled)
            paths = [entry.path for entry in self.choice.bundled if len(entry.path) == longest]
            memories = {str(path): read_memory(self.choice.bank, str(path)) for path in (min(paths), max(paths))}
        trial = Trial(self.reference, memories, self.steps.did)
        self.steps.expect(trial.texts)
        return self.target.measure(SavedAnchor(folder / self.target.anchor, anchor, memory), trial)

    def _write_retriever(self, choice: Choice, folder: pathlib.Path) -> dict[str, Any]:
        """What finds the bank's paths; returns the manifest's `retriever`."""
        embedder = load_embedder(choice.bank.manifest.embedder)
        name, tokenizer = self.target.retriever, package.RETRIEVER_TOKENIZER
        found = self.target.save_retriever(embedder, folder / name, folder / tokenizer)
        return {"package": name, "tokenizer": tokenizer} | found

    def _receipt(self, plan: PrecisionPlan, measured: Measured, devices: list[dict[str, Any]]) -> dict[str, Any]:
        """How it was made and what was measured."""
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": tool_versions(),
            "anchor": identify(self.anchor).to_json(),
            "options": asdict(self.options),
            "weights": plan.to_json() | {"bound": self.bound},
            "measured": measured.distance.to_json(),
            "overflow": measured.overflow.to_json(),
            "devices": devices,
        }
