"""The PyTorch definitions: the paper's parameter counts, and what every memory must do wherever it is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from sources import hf_model
from tiny_openlm import SIZES, random_openlm

from mlx_hiermem.config import KINDS, MemoryConfig
from mlx_hiermem.convert.anchors.openlm_config import NORMS, POSITIONS
from mlx_hiermem.convert.reference import ANCHORS, OpenLM, count_parameters
from mlx_hiermem.convert.reference_memory import Bank, attach, init_memory, join
from mlx_hiermem.errors import AnchorError, HierMemError

TOKENS = torch.arange(3, 23).reshape(2, 10)
PAPER = {  # arXiv:2510.02375, Tables 4-6 and 8
    "160M": 163_510_016,
    "260M": 257_475_584,
    "320M": 321_721_344,
    "350M": 347_419_648,
    "370M": 373_117_952,
    "385M": 385_967_104,
    "410M": 411_665_408,
    "1.4B": 1_439_893_504,
}


def openlm_memory(kind: str, layers: tuple[int, ...] = (0, 2), sizes: tuple[int, ...] = (3, 2)) -> MemoryConfig:
    width = SIZES["heads"] * SIZES["head_dim"]
    return MemoryConfig(
        kind, 2, sizes, layers, SIZES["hidden"], ffn_width=SIZES["ffn_width"], q_width=width, kv_width=width
    )


def random_memory(config: MemoryConfig, units: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in config.shapes(units).items()}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_counts_of_the_paper() -> None:
    found = {name: count_parameters(name, (1,))["anchor"] for name in ANCHORS}
    assert found == PAPER
    assert count_parameters("160M", (256, 64, 16, 0)) == {
        "anchor": 163_510_016,
        "fetched": 18_063_360,
        "bank": 4_624_220_160,
    }
    with pytest.raises(HierMemError, match="2B"):
        count_parameters("2B", (1,))


@pytest.mark.parametrize("anchor", ["160M", "410M"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_sizes_are_the_papers_formulae(kind: str, anchor: str) -> None:
    """§2.2: per unit and layer 3d, 2(d + h d_h), 2(d + h d_h), 3(d + d_f), 2 h d_h."""
    c = ANCHORS[anchor]
    per_unit = {
        "ffn": 3 * c.hidden,
        "lora-qk": 2 * (c.hidden + c.heads * c.head_dim),
        "lora-vo": 2 * (c.hidden + c.heads * c.head_dim),
        "lora-ffn": 3 * (c.hidden + c.ffn_width),
        "kv": 2 * c.heads * c.head_dim,
    }[kind] * c.layers
    counts = count_parameters(anchor, (5, 0, 2), branching=4, kind=kind)
    assert counts["fetched"] == 7 * per_unit
    assert counts["bank"] == (5 * 4 + 2 * 64) * per_unit


def test_openlm_equals_llama_where_they_are_the_same() -> None:
    """An implementation that is not ours: RMS norms and half-split rotary positions are Llama's."""
    ours = random_openlm(norm="rms_norm", rope_base=5_000.0)
    c = ours.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden, intermediate_size=c.ffn_width,
            num_hidden_layers=c.layers, num_attention_heads=c.heads, head_dim=c.head_dim, rms_norm_eps=c.eps,
            rope_theta=c.rope_base,
        )
    )  # fmt: skip
    state = {"model.embed_tokens.weight": ours.tok_embeddings.weight, "model.norm.weight": ours.norm.weight}
    state["lm_head.weight"] = ours.output.weight
    for i, layer in enumerate(ours.layers):
        name = f"model.layers.{i}"
        q, k, v = layer.attention.in_proj.weight.chunk(3)
        gate, up = layer.feed_forward.w12.weight.chunk(2)
        state |= {f"{name}.self_attn.{n}_proj.weight": w for n, w in zip("qkv", (q, k, v), strict=True)}
        state |= {f"{name}.mlp.gate_proj.weight": gate, f"{name}.mlp.up_proj.weight": up}
        state[f"{name}.self_attn.o_proj.weight"] = layer.attention.out_proj.weight
        state[f"{name}.mlp.down_proj.weight"] = layer.feed_forward.w3.weight
        state[f"{name}.input_layernorm.weight"] = layer.attention_norm.weight
        state[f"{name}.post_attention_layernorm.weight"] = layer.ffn_norm.weight
    llama.load_state_dict(state)
    assert torch.allclose(logits(ours), logits(llama.eval()), atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_cached_decoding(position: str) -> None:
    model = random_openlm(position=position, qk_norm=True)
    cache: dict = {}
    pieces = [model(piece, cache) for piece in (TOKENS[:, :4], TOKENS[:, 4:7], *TOKENS[:, 7:].split(1, dim=1))]
    assert torch.allclose(torch.cat(pieces, 1), model(TOKENS), atol=1e-5)


def test_positions() -> None:
    """Each kind is another function, except that turning by the head's number cancels in q.k."""
    out = {kind: logits(random_openlm(position=kind)) for kind in POSITIONS}
    assert torch.allclose(out["head_rotary"], out["none"], atol=1e-5)
    for one, other in (("rotary", "none"), ("llama_rotary", "none"), ("rotary", "llama_rotary")):
        assert (out[one] - out[other]).abs().max() > 1e-2
    assert (logits(random_openlm(rope_base=100_000.0)) - out["rotary"]).abs().max() > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_state_dict_names(norm: str) -> None:
    model = random_openlm(norm=norm, qk_norm=True, post_embed_norm=True)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == model.config.shapes()


@pytest.mark.parametrize("kind", KINDS)
def test_no_effect_at_init(kind: str) -> None:
    """And an effect once the zero factor is not zero: the hooks are in place."""
    model, config = random_openlm(), openlm_memory(kind)
    before = logits(model)
    attachment = attach(model, config)
    assert torch.equal(logits(model), before)
    fresh = init_memory(config, 4, torch.Generator().manual_seed(1))
    attachment.set(fresh)
    assert torch.equal(logits(model), before)
    zeros = [name for name, tensor in fresh.items() if not tensor.any()]
    assert zeros
    assert len(zeros) < len(fresh)
    random = random_memory(config, 4)
    attachment.set({**fresh, **{name: random[name] for name in zeros}})
    assert (logits(model) - before).abs().max() > 1e-3
    attachment.clear()
    assert torch.equal(logits(model), before)
    attachment.set(random)
    attachment.detach()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kv"])
@torch.no_grad()
def test_joined_blocks_are_the_sum_of_the_blocks(kind: str) -> None:
    """In the first layer that carries memory; a softmax over joined KV slots is no sum."""
    model, config = random_openlm(layers=1), openlm_memory(kind, layers=(0,))
    layer, outputs = model.layers[0], []
    site = {"ffn": layer.feed_forward, "lora-ffn": layer.feed_forward.w12}.get(kind, layer.attention.in_proj)
    attachment = attach(model, config)
    site.register_forward_hook(lambda _, args, y: outputs.append(y))
    blocks = [random_memory(config, 3, seed=1), random_memory(config, 2, seed=2)]
    logits(model)
    for chosen in ([blocks[0]], [blocks[1]], blocks):
        attachment.set(join(config, chosen))
        logits(model)
    none, first, second, both = outputs
    assert (first - none).abs().max() > 1e-3
    assert torch.allclose(both - none, (first - none) + (second - none), atol=1e-5)


@torch.no_grad()
def test_ffn_memory_equals_a_wider_ffn() -> None:
    model, config = random_openlm(), openlm_memory("ffn", layers=(0, 1, 2))
    memory = random_memory(config, 5)
    attach(model, config).set(memory)
    wide = OpenLM(replace(model.config, ffn_width=model.config.ffn_width + 5))
    state = dict(model.state_dict())
    for i in range(3):
        gate, up = state[f"layers.{i}.feed_forward.w12.weight"].chunk(2)
        w12 = torch.cat((gate, memory["gate"][i], up, memory["up"][i]))
        state[f"layers.{i}.feed_forward.w12.weight"] = w12
        down = state[f"layers.{i}.feed_forward.w3.weight"]
        state[f"layers.{i}.feed_forward.w3.weight"] = torch.cat((down, memory["down"][i].T), 1)
    wide.load_state_dict(state)
    assert torch.allclose(logits(model), logits(wide), atol=1e-5)


@torch.no_grad()
def test_lora_memory_equals_changed_weights() -> None:
    """W + (alpha / r) B A, computed in the weights instead."""
    model, config = random_openlm(), openlm_memory("lora-qk", layers=(1,), sizes=(4,))
    block = random_memory(config, 4)
    attachment = attach(model, config)
    attachment.set(join(config, [block]))
    beside = logits(model)
    attachment.clear()
    q, k, _ = model.layers[1].attention.in_proj.weight.chunk(3)  # views
    for weight, name in ((q, "q"), (k, "k")):
        weight += config.alpha / 4 * block[f"{name}.b"][0].T @ block[f"{name}.a"][0]
    assert torch.allclose(beside, logits(model), atol=1e-5)


def test_bank_fetches_rows_in_path_order() -> None:
    config = openlm_memory("ffn", sizes=(3, 0, 2))
    bank = Bank(config)
    with torch.no_grad():
        for level in bank.levels:
            for tensor in level.values():
                tensor.copy_(torch.arange(len(tensor)).reshape(-1, 1, 1, 1).expand_as(tensor))
    fetched = bank.fetch((1, 0, 1))
    assert {name: tuple(t.shape) for name, t in fetched.items()} == config.shapes(5)
    assert fetched["down"][0, :, 0].tolist() == [1, 1, 1, 5, 5]  # 101 in base 2


def test_memory_trains() -> None:
    """Gradients reach an attached memory: the same reference serves a trainer."""
    model, config = hf_model("qwen3"), MemoryConfig("ffn", 2, (3,), (1,), 64)
    memory = {name: tensor.requires_grad_() for name, tensor in init_memory(config, 3).items()}
    attach(model, config).set(memory)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert memory["down"].grad is not None
    assert memory["down"].grad.abs().max() > 0


def test_wrong_memories_are_refused() -> None:
    model, config = random_openlm(), openlm_memory("ffn")
    with pytest.raises(AnchorError, match="layer 9"):
        attach(model, openlm_memory("ffn", layers=(9,)))
    with pytest.raises(HierMemError, match="expected"):
        attach(model, config).set(random_memory(openlm_memory("ffn", layers=(0, 1, 2)), 4))
