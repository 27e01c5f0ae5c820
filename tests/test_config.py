"""Paths, sizes and JSON of a memory design."""

import json

import pytest

from mlx_hiermem.config import KINDS, MemoryConfig, Path
from mlx_hiermem.errors import BankError, HierMemError


def test_path_text_and_rows() -> None:
    path = Path.parse("10.7.15")
    assert path == (10, 7, 15)
    assert str(path) == "10.7.15"
    assert [str(node) for node in path.prefixes()] == ["10", "10.7", "10.7.15"]
    assert path.row(16) == (10 * 16 + 7) * 16 + 15
    assert Path.of_row(path.row(16), 3, 16) == path


@pytest.mark.parametrize(
    "text",
    ["", "a", "1..2", "-1", "1.-2", "1,2", "+1", " 1", "1 . 0", "1_0", "٠", "-0", "01", "1\n", "9" * 10, None],
)
def test_bad_path(text: str) -> None:
    with pytest.raises(HierMemError, match="not a path"):
        Path.parse(text)


@pytest.mark.parametrize("text", ["+1", " 1", "1 . 0", "1_0", "٠", "-0", "01", "1\n", "9" * 10, None])
def test_a_node_has_one_spelling(text: str) -> None:
    with pytest.raises(HierMemError, match="not a path"):
        Path.parse(text)


def test_paper_sizes() -> None:
    """arXiv:2510.02375, §2.2: 160M anchor, l = 35, d = 512, (256, 64, 16, 0)."""
    config = MemoryConfig("ffn", 16, (256, 64, 16, 0), tuple(range(35)), 512)
    assert config.fetched_parameters == 18_063_360
    assert config.bank_parameters == 4_624_220_160


def test_sizes_follow_the_papers_formulae() -> None:
    d, f, width, layers, r = 8, 20, 12, 3, 5
    expected = {
        "ffn": 3 * r * layers * d,
        "lora-qk": 2 * r * layers * (d + width),
        "lora-vo": 2 * r * layers * (d + width),
        "lora-ffn": 3 * r * layers * (d + f),
        "kv": 2 * r * layers * width,
    }
    assert set(expected) == set(KINDS)
    for kind, count in expected.items():
        config = MemoryConfig(kind, 2, (r,), (0, 1, 2), d, ffn_width=f, q_width=width, kv_width=width)
        assert config.parameters(r) == count


def test_json_round_trip() -> None:
    config = MemoryConfig("kv", 4, (8, 0, 2), (1, 2), 32, "bfloat16", q_width=32)
    assert MemoryConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_unknown_settings_are_refused() -> None:
    data = MemoryConfig("ffn", 4, (8,), (0,), 32).to_json()
    with pytest.raises(BankError, match="does not fit this version"):
        MemoryConfig.from_json(data | {"gating": "top-2"})
    with pytest.raises(BankError, match="does not fit this version"):
        MemoryConfig.from_json(data | {"quantization": [8]})


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "moe"},
        {"dtype": "int3"},
        {"branching": 1},
        {"block_sizes": ()},
        {"block_sizes": (4, -1)},
        {"layers": ()},
        {"layers": (1, 1)},
        {"kind": "kv"},  # without q_width
    ],
)
def test_impossible_designs(change: dict) -> None:
    with pytest.raises(HierMemError):
        MemoryConfig(
            **({"kind": "ffn", "branching": 4, "block_sizes": (8,), "layers": (0,), "hidden": 32} | change)
        )
