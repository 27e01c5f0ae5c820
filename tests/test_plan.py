"""`hiermem plan`: sizes are those of the files and of a real KV cache, times follow from the table of devices."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest
from hub_server import HubServer
from tiny import LLAMA

from mlx_hiermem import load, plan
from mlx_hiermem.apps.cli.main import main
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import AnchorError, HierMemError
from mlx_hiermem.sampling import Sampling

PRO = "iphone-15-pro"


def paper_model() -> plan.ModelSize:
    """The paper's 160M anchor with its bank (256, 64, 16, 0), in half precision (arXiv:2510.02375, Table 1)."""
    memory = MemoryConfig("ffn", 16, (256, 64, 16, 0), tuple(range(35)), 512)
    levels = []
    for level, units in enumerate(memory.block_sizes, 1):
        block = 2 * memory.parameters(units)
        levels.append(plan.Level(level, 16**level if units else 0, block, block * 16**level))
    return plan.ModelSize("160M", 2 * 163_510_016, 2 * 2 * 35 * 12 * 32, 8192, tuple(levels))


def test_sizes_are_those_of_the_files(folder: pathlib.Path) -> None:
    size = plan.measure(folder)
    blocks = [file.stat().st_size for file in (folder / "bank/blocks").rglob("*.safetensors")]
    assert size.bank_bytes == sum(blocks)
    assert size.path_bytes == max(blocks) + min(blocks)  # level 1 has twice the units of level 2
    assert size.anchor_bytes == (folder / "anchor/model.safetensors").stat().st_size
    assert [level.blocks for level in size.levels] == [3, 9]
    plain = plan.measure(folder / "anchor")
    assert (plain.anchor_bytes, plain.levels, plain.has_bank) == (size.anchor_bytes, (), False)


def test_kv_bytes_are_those_of_a_real_cache(folder: pathlib.Path) -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    opened = load(folder)
    cache = make_prompt_cache(opened.anchor)
    for _ in opened.responses(opened.tokens("x" * 20), Sampling(3), prompt_cache=cache):
        pass
    arrays = [
        array for entry in cache for array in entry.state if isinstance(array, mx.array)
    ]  # [1, heads, n, width]
    assert sum(a.nbytes // a.shape[2] for a in arrays) == plan.kv_bytes(LLAMA | {"torch_dtype": "float32"})
    assert plan.kv_bytes(LLAMA) == plan.kv_bytes(LLAMA | {"torch_dtype": "float32"}) // 2
    with pytest.raises(HierMemError, match="no 'num_attention_heads'"):
        plan.kv_bytes({})


def test_nested_configs_and_head_widths() -> None:
    gemma = {"text_config": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}}
    gemma["text_config"] |= {"num_hidden_layers": 18, "max_position_embeddings": 32768}
    size = plan._size("gemma", gemma, 0, None)
    assert (size.kv_bytes, size.max_context) == (2 * 18 * 1 * 256 * 2, 32768)


def test_times_are_the_stated_arithmetic() -> None:
    device = plan.device(PRO)
    result = plan.plan(paper_model(), device)
    whole, without_1, without_2 = result.fetches
    assert [fetch.files for fetch in result.fetches] == [3, 2, 1]  # level 4 has no blocks
    assert whole.bytes == 2 * 18_063_360
    assert whole.cold_ms == pytest.approx(3 * 0.1 + 36.12672 / 1.450)
    assert whole.warm_ms == pytest.approx(2 * 36.12672 / 51.2)
    assert without_1.bytes == whole.bytes * 80 // 336
    assert without_2.bytes == whole.bytes * 16 // 336
    assert result.tokens_per_second == pytest.approx(51.2e9 / (2 * 163_510_016 + whole.bytes))


def test_a_new_topic_beside_a_flat_bank() -> None:
    phone, mac = (plan.plan(paper_model(), plan.device(name)) for name in ("iphone-15", "macbook-pro-16gb"))
    level_2_and_3 = 2 * 53_760 * 80
    expected = phone.device.warm_ms(2 * 53_760 * 256) + phone.device.cold_ms(2, level_2_and_3)
    assert phone.topic_ms == pytest.approx(expected)  # level 1 is in memory
    assert mac.topic_ms == pytest.approx(mac.device.warm_ms(2 * 18_063_360))  # all levels are
    for result in (phone, mac):
        assert result.flat_ms == pytest.approx(result.device.cold_ms(1, 2 * 18_063_360))
        assert result.topic_ms < result.flat_ms / 2
    assert plan.plan(plan.ModelSize("plain", 1, 1, 8), plan.device(PRO)).flat_ms == 0


def test_a_bank_on_an_external_disk() -> None:
    inside, outside = plan.device("macbook-air-8gb"), plan.device("macbook-air-8gb", "usb-hard-disk")
    assert (outside.usable, outside.bandwidth) == (inside.usable, inside.bandwidth)
    assert outside.cold_ms(2, 13_000_000) == pytest.approx(2 * 15 + 100)
    assert "USB hard disk" in outside.title
    with pytest.raises(HierMemError, match=r"no disk 'floppy' in the table. Known: usb-ssd, usb-hard-disk"):
        plan.device("macbook-air-8gb", "floppy")


def test_what_fits() -> None:
    size = paper_model()
    assert size.bank_bytes == 2 * 4_624_220_160
    phone, mac = (plan.plan(size, plan.device(name)) for name in ("iphone-15", "macbook-pro-16gb"))
    assert phone.fits
    assert phone.pinned_levels == 1  # all of level 2 is 1.8 GB
    assert mac.pinned_levels == 4  # and level 3 is 7.0 GB
    first = phone.contexts[0]
    assert phone.fixed_bytes + first.kv_bytes + first.left_bytes == phone.device.usable == int(6 * 0.375 * 2**30)
    assert 0 < phone.contexts[-1].paths < phone.contexts[0].paths == first.left_bytes // (80 * 2 * 53_760) < 4096
    assert [context.tokens for context in phone.contexts] == [512, 2048, 4096, 8192]  # no further than the anchor
    large = plan.ModelSize("7B", 14 << 30, 1 << 19, 8192)
    too_much = plan.plan(large, plan.device("macbook-air-8gb"), [2048])
    assert not too_much.fits
    assert too_much.contexts[0].left_bytes < -(8 << 30)
    assert too_much.fetches == ()


def test_a_bank_that_fits_whole(folder: pathlib.Path) -> None:
    result = plan.plan(plan.measure(folder), plan.device(PRO))
    assert result.pinned_levels == 2
    assert result.contexts[0].paths == 9


def test_every_figure_has_a_basis_and_a_source() -> None:
    rows = [*plan.devices().values(), *plan.disks().values()]
    for row in rows:
        names = ("memory", "share", "storage", "bandwidth", "access")
        for figure in (getattr(row, name) for name in names if hasattr(row, name)):
            assert figure.value > 0
            assert figure.basis in ("vendor", "measured", "reported", "assumed")
            assert len(figure.source) > 10
    with pytest.raises(HierMemError, match=r"no device 'nokia' in the table. Known: iphone-15, "):
        plan.device("nokia")


def test_model_on_the_hub_is_planned_without_its_weights(hub: HubServer, folder: pathlib.Path) -> None:
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    hub.repo("me/tiny").commit(files)
    here, there = plan.measure(folder), plan.measure("me/tiny")
    assert there.name == "me/tiny"
    assert plan.plan(here, plan.device(PRO)).contexts == plan.plan(there, plan.device(PRO)).contexts
    assert here.levels == there.levels
    assert sorted(hub.downloads()) == ["anchor/config.json", "bank/bank.json"]
    with pytest.raises(AnchorError, match="there is no model at nowhere"):
        plan.measure("nowhere")


def hiermem(capsys: pytest.CaptureFixture[str], *arguments: str | pathlib.Path) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hiermem", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    done = capsys.readouterr()
    return int(ended.value.code or 0), done.out, done.err


@pytest.mark.slow
def test_command(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, errors = hiermem(capsys, folder)
    assert (code, errors) == (0, "")
    assert all(name in text for name in plan.devices())
    text = hiermem(capsys, folder, "--device", PRO, "--context", "1024")[1]
    for part in ("iPhone 15 Pro", "3.2 GB for one program (assumed)", "1024 tokens", "all 9", "the whole path"):
        assert part in text
    assert "in memory" in text
    assert "a flat bank" in text
    assert "on a USB SSD" in hiermem(capsys, folder, "--device", PRO, "--disk", "usb-ssd")[1]
    text = hiermem(capsys, folder, "--device", PRO, "--context", "99999")[1]
    assert "no more than" in text
    text = hiermem(capsys, folder / "anchor", "--device", PRO)[1]
    assert "embedder" not in text
    data = json.loads(hiermem(capsys, folder, "--device", PRO, "--json")[1])
    assert data["fits"] is True
    assert data["device"]["storage"]["basis"] == "measured"
    assert len(json.loads(hiermem(capsys, folder, "--json")[1])) == len(plan.devices())
    assert "developer.apple.com" in "".join(hiermem(capsys, "--list")[1].split())
    listed = json.loads(hiermem(capsys, "--list", "--json")[1])
    assert [row["name"] for row in listed] == [*plan.devices(), *plan.disks()]
    assert all(name in hiermem(capsys, "--list")[1] for name in (*plan.devices(), *plan.disks()))


def test_command_fails_in_one_line(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((folder, "--device", "nokia"), ("nowhere",)):
        code, text, errors = hiermem(capsys, *arguments)
        assert (code, text, errors.count("\n")) == (1, "", 1)
    assert hiermem(capsys, folder, "--context", "0")[0] == 2


def test_command_takes_the_model_used_last(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIERMEM_MODEL", str(folder))
    assert hiermem(capsys, "--device", PRO) == hiermem(capsys, folder, "--device", PRO)
