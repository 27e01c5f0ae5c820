"""Memory checkpoints of every kind and shape, converted and run, against PyTorch and none of this project's code.

What a memory means is written out here once more: rows are found by the path read as a number, FFN units widen the
feed-forward layers themselves, LoRA is added to the weights, and keys and values are attended to in a few lines.
"""

import ctypes
import dataclasses
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sources import hf_model, memory_config, save_hf
from test_memories import documented, make_tensors, settings_of

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import KINDS, MemoryConfig, Path
from mlx_hiermem.convert import parity
from mlx_hiermem.convert.pipeline import convert

IDS = parity.prompt(30, 260)
LORA = {"lora-qk": "qk", "lora-vo": "vo", "lora-ffn": ("gate", "up", "down")}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_hf(hf_model("llama"), tmp_path_factory.mktemp("source") / "tiny")


@dataclasses.dataclass(frozen=True)
class Shape:
    branching: int
    sizes: tuple[int, ...]
    absent: tuple[str, ...] = ()
    generic: int = 0
    layers: tuple[int, ...] = (0, 2)


SHAPES = {
    "one level of 7": Shape(7, (3,), generic=5),
    "depth 5": Shape(2, (3, 1, 2, 1, 2), layers=(1,)),
    "ragged, a level without memory": Shape(3, (2, 0, 1), ("0.1", "2", "1.1.1"), generic=1, layers=(0, 1, 2)),
}
FORMS = ("safetensors", "bfloat16 .pt", "shards", "key map", "distributed")


def design(kind: str, shape: Shape) -> MemoryConfig:
    tiny = memory_config(hf_model("llama").config, kind, shape.layers)
    return dataclasses.replace(tiny, branching=shape.branching, block_sizes=shape.sizes)


def write(folder: pathlib.Path, form: str, tensors: Tensors, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes the checkpoint; returns the options of `convert`."""
    folder.mkdir()
    (folder / "memory.json").write_text(json.dumps(settings))
    names = sorted(tensors)
    if form == "safetensors":
        save_file(tensors, folder / "memory.safetensors", metadata={"config": json.dumps(settings)})
        return {"memory": folder / "memory.safetensors"}
    if form == "bfloat16 .pt":
        torch.save({"state_dict": tensors, "config": settings}, folder / "memory.pt")
        return {"memory": folder / "memory.pt"}
    if form == "shards":
        for half in (0, 1):
            save_file({name: tensors[name] for name in names[half::2]}, folder / f"part{half}.safetensors")
    elif form == "key map":  # other names, and w3 as a linear layer has it
        foreign = {
            f"module.bank/{name}": t.mT.contiguous() if name.endswith(".w3") else t for name, t in tensors.items()
        }
        save_file(foreign | {"step": torch.ones(1)}, folder / "m.safetensors")
        lines = ["memory.level{level}.w3", "memory.generic.w3"]
        table = folder / "keys.toml"
        table.write_text(
            f'transpose = {lines}\nignore = ["step"]\n[keys]\n'
            '"bank/memory.level{level}.{part}" = "memory.level{level}.{part}"\n'
            '"bank/memory.level{level}.{part}.{side}" = "memory.level{level}.{part}.{side}"\n'
            '"bank/memory.generic.{part}" = "memory.generic.{part}"\n'
            '"bank/memory.generic.{part}.{side}" = "memory.generic.{part}.{side}"\n'
            '"bank/tree.level{level}.{what}" = "tree.level{level}.{what}"\n'
        )
        return {"memory": folder, "key_map": table}
    else:
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings(action="ignore"):  # that there is one process only
            dcp.save({"model": tensors}, checkpoint_id=folder, no_dist=True)
    return {"memory": folder}


def rows_of(tensors: Tensors, config: MemoryConfig, memory: str) -> Iterator[dict[str, torch.Tensor]]:
    """Each block of a path (or the generic one) as it is in the checkpoint: part -> [L, r, width]."""
    if memory == "generic":
        yield {part: tensors[f"memory.generic.{documented(part)}"].float() for part in config.widths}
        return
    digits = memory.split(".")
    for level, units in enumerate(config.block_sizes[: len(digits)], 1):
        row = int("".join(digits[:level]), config.branching)
        if units:
            yield {p: tensors[f"memory.level{level}.{documented(p)}"][row].float() for p in config.widths}


def remember(model: Any, config: MemoryConfig, blocks: list[dict[str, torch.Tensor]]) -> None:
    """Builds a memory into the model's own weights; keys and values into its attention."""
    for index, number in enumerate(config.layers):
        layer = model.model.layers[number]
        mlp, attention = layer.mlp, layer.self_attn
        for block in blocks:
            part = {name: tensor[index] for name, tensor in block.items()}
            if config.kind == "ffn":
                mlp.gate_proj.weight.data = torch.cat([mlp.gate_proj.weight.data, part["gate"]])
                mlp.up_proj.weight.data = torch.cat([mlp.up_proj.weight.data, part["up"]])
                mlp.down_proj.weight.data = torch.cat([mlp.down_proj.weight.data, part["down"].T], dim=1)
            elif config.kind != "kv":
                for name in LORA[config.kind]:
                    linear = getattr(mlp if config.kind == "lora-ffn" else attention, f"{name}_proj")
                    a, b = part[f"{name}.a"], part[f"{name}.b"]
                    linear.weight.data += 2.0 / len(a) * b.T @ a
        if config.kind == "kv":
            attend(attention, *(torch.cat([block[name][index] for block in blocks]) for name in "kv"))


def attend(attention: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Every query, before its rotation, also attends to the learned keys of its head; that is added."""
    size, kept = attention.head_dim, []

    def add(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        queries, heads = kept.pop(), []
        for at in range(0, queries.shape[-1], size):
            own = slice(at, at + size)
            weights = torch.softmax(queries[..., own] @ keys[:, own].T / size**0.5, dim=-1)
            heads.append(weights @ values[:, own])
        return (args[0] + torch.cat(heads, dim=-1),)

    attention.q_proj.register_forward_hook(lambda _, __, out: kept.append(out))
    attention.o_proj.register_forward_pre_hook(add)


def check(model: pathlib.Path, tensors: Tensors, config: MemoryConfig, memories: list[str]) -> None:
    bank = MemoryBank.open(model / "bank")
    ours = parity.MLXSide(load_anchor(model / "anchor")[0], BlockCache(bank))
    plain = parity.TorchSide(hf_model("llama")).run(IDS, "none")[1]
    for memory in memories:
        theirs = hf_model("llama")
        remember(theirs, config, list(rows_of(tensors, config, memory)))
        with torch.no_grad():
            expected = theirs(torch.from_numpy(IDS)).logits.numpy()
        assert parity.difference(plain, expected) > 1e-3
        assert parity.difference(ours.run(IDS, memory)[1], expected) < 1e-5, memory


def leaves(shape: Shape) -> list[str]:
    """The first, a middle and the last path that is there."""
    depth, k = len(shape.sizes), shape.branching
    every = [".".join(np.base_repr(i, k).zfill(depth)) for i in range(k**depth)]
    there = [p for p in every if not any(p == gone or p.startswith(f"{gone}.") for gone in shape.absent)]
    return [there[0], there[len(there) // 2], there[-1]] + ["generic"] * bool(shape.generic)


CASES = [
    (kind, name, FORMS[(i + 2 * j) % len(FORMS)]) for i, kind in enumerate(KINDS) for j, name in enumerate(SHAPES)
]


@pytest.mark.parametrize(("kind", "name", "form"), CASES, ids=[f"{k}-{n}-{f}" for k, n, f in CASES])
def test_every_kind_shape_and_form(
    source: pathlib.Path, tmp_path: pathlib.Path, kind: str, name: str, form: str
) -> None:
    shape, config = SHAPES[name], design(kind, SHAPES[name])
    stored = dataclasses.replace(config, dtype="bfloat16" if form.startswith("bfloat16") else "float32")
    tensors = make_tensors(stored, generic=shape.generic, absent=shape.absent)
    tensors = {name: 0.3 * t if name.startswith("memory") else t for name, t in tensors.items()}
    settings = settings_of(config) | {"anchor": {"hidden": 64, "layers": 3}}
    options = write(tmp_path / "memory", form, tensors, settings)
    convert(source, tmp_path / "model", **options)
    bank = MemoryBank.open(tmp_path / "model/bank")
    assert bank.config == stored
    assert (bank.manifest.generic is not None) == bool(shape.generic)
    assert list(bank.problems()) == []
    for path in shape.absent:
        assert not (tmp_path / "model/bank" / block_name(Path.parse(path))).exists()
    check(tmp_path / "model", tensors, config, leaves(shape))


def test_seven_children_five_levels_deep(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """16 807 leaves, of which six are there: rows of the others are not read."""
    shape = Shape(7, (1, 0, 1, 0, 2), layers=(1,))
    config, there = design("ffn", shape), ["0.0.0.0.0", "3.1.4.1.5", "6.6.6.6.6"]
    tensors: Tensors = {}
    torch.manual_seed(0)
    for level, units in enumerate(shape.sizes, 1):
        rows = sorted({int(path.replace(".", "")[:level], 7) for path in there})
        for part, block in config.shapes(units).items() if units else ():
            tensors[f"memory.level{level}.{documented(part)}"] = torch.full((7**level, *block), torch.nan)
            tensors[f"memory.level{level}.{documented(part)}"][rows] = 0.3 * torch.randn(len(rows), *block)
        tensors[f"tree.level{level}.centroids"] = torch.nn.functional.normalize(torch.randn(7**level, 384), dim=1)
        tensors[f"tree.level{level}.centroids"] = tensors[f"tree.level{level}.centroids"].view(-1, 7, 384)
        present = torch.zeros(7**level, dtype=torch.bool)
        present[rows] = True
        tensors[f"tree.level{level}.present"] = present.view(-1, 7)
    save_file(tensors, tmp_path / "m.safetensors", metadata={"layers": "[1]", "kind": "ffn"})
    convert(source, tmp_path / "model", memory=tmp_path / "m.safetensors")
    assert len(MemoryBank.open(tmp_path / "model/bank").manifest.blocks) == 3 + 3 + 3
    check(tmp_path / "model", tensors, config, there)


CONVERT = "import sys; from mlx_hiermem.apps.cli.main import main; sys.exit(main())"


def run(arguments: list[Any], prepare: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CONVERT, "convert", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=prepare)


@pytest.fixture
def memory(tmp_path: pathlib.Path) -> tuple[pathlib.Path, Tensors, MemoryConfig]:
    shape = Shape(7, (40,))
    config = design("ffn", shape)
    tensors = {n: 0.3 * t if n.startswith("memory") else t for n, t in make_tensors(config).items()}
    settings = settings_of(config) | {"anchor": {"hidden": 64, "layers": 3}}
    return write(tmp_path / "memory", "safetensors", tensors, settings)["memory"], tensors, config


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2_000, 200_000, 50_000], ids=["at once", "in the anchor", "in the bank"])
def test_the_disk_is_full(
    source: pathlib.Path, tmp_path: pathlib.Path, memory: tuple[pathlib.Path, Tensors, MemoryConfig], limit: int
) -> None:
    """No file may grow beyond a limit, as on a full disk; the run says so, and goes on once there is room."""
    file, tensors, config = memory
    arguments = [source, tmp_path / "model", "--memories", file, "--resume"]
    if limit == 50_000:  # an anchor that is whole already is kept
        convert(source, tmp_path / "before")
        (tmp_path / "model.partial").mkdir()
        (tmp_path / "before/anchor").rename(tmp_path / "model.partial/anchor")

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run(arguments, full)
    assert done.returncode == 1
    assert "the disk is full" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()
    assert run(arguments, lambda: None).returncode == 0
    check(tmp_path / "model", tensors, config, ["0", "6"])


def without_privilege() -> None:
    """As root, permissions bind only where the capabilities to override them are dropped."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="drops root's privilege by Linux's own call")
def test_a_target_that_is_read_only(
    source: pathlib.Path, tmp_path: pathlib.Path, memory: tuple[pathlib.Path, Tensors, MemoryConfig]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o555)
    done = run([source, tmp_path / "there/model", "--memories", memory[0]], without_privilege)
    (tmp_path / "there").chmod(0o755)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "cannot write" in said
    assert "Permission denied" in said
    assert "Traceback" not in said
    assert list((tmp_path / "there").iterdir()) == []
