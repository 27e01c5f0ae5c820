"""MemoryModel and Session on a tiny random anchor: memories change answers, and only where they should."""

import dataclasses
import json
import pathlib

import mlx.core as mx
import pytest
from tiny import CONFIG, LLAMA, load_tiny, make_anchor, make_bank, make_model

from mlx_hiermem import load
from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.apps.cli import main as cli
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import KINDS, Path
from mlx_hiermem.convert.export import package
from mlx_hiermem.convert.export.chat import render
from mlx_hiermem.errors import AnchorError, AnchorMismatchError, BankError, ChatTemplateError, HierMemError
from mlx_hiermem.memory.attach import attach
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sampling import Sampling
from mlx_hiermem.session import Session


@pytest.fixture
def model(tmp_path: pathlib.Path) -> MemoryModel:
    return load_tiny(make_model(tmp_path / "model"))


def _logits(model: MemoryModel, text: str) -> mx.array:
    return model.anchor(mx.array([model.tokens(text)]))


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = make_anchor(tmp_path / "anchor"), tmp_path / "meminfo"
    monkeypatch.setattr("mlx_hiermem.anchor.MEMORY", said)
    said.write_text("MemTotal: 99999999 kB\nMemAvailable: 100 kB\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_lm.utils.load_model", lambda *_, **__: pytest.fail("it was loaded"))
        with pytest.raises(AnchorError, match=r"0\.0 GB are free"):
            load_anchor(folder)
    said.write_text("nothing that is known")
    assert load_anchor(folder)[1] is not None


def test_each_memory_gives_other_logits(model: MemoryModel) -> None:
    seen = []
    for memory in ("none", "generic", "0.1", "2.2"):
        model.select(memory, "")
        seen.append(_logits(model, "hello"))
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert mx.abs(one - other).max() > 1e-3
    model.select("none", "")
    assert mx.array_equal(_logits(model, "hello"), seen[0])


def test_fetched_is_the_routed_path(model: MemoryModel) -> None:
    chosen = model.select("fetched", "what is it?")
    assert chosen.path == model.router.route("what is it?").path
    assert chosen.labels == tuple(f"topic {node}" for node in chosen.path.prefixes())
    assert chosen.bytes_read > chosen.memory_bytes > 0  # the files have headers
    assert model.select("fetched", "what is it?").bytes_read == 0
    fetched = _logits(model, "what is it?")
    model.select(str(chosen.path), "")
    assert mx.array_equal(fetched, _logits(model, "what is it?"))


def test_widening_the_anchor_gives_the_same(model: MemoryModel, tmp_path: pathlib.Path) -> None:
    """The side FFN equals the anchor with the units concatenated into its own weights (Eq. 2.2)."""
    model.select("1.2", "")
    with_memory = _logits(model, "hello")
    assert model.cache
    memory = model.cache.fetch(Path((1, 2))).memory
    model.select("none", "")
    assert memory
    for index, layer in enumerate(CONFIG.layers):
        ffn = model.anchor.layers[layer].mlp
        for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
            linear = ffn[f"{name}_proj"]
            unit = memory.tensors[name][index]
            linear.weight = mx.concatenate([linear.weight, unit if axis == 0 else unit.T], axis=axis)
    assert mx.allclose(_logits(model, "hello"), with_memory, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_anchors_carry_every_kind(tmp_path: pathlib.Path, kind: str) -> None:
    import mlx.nn as nn

    config = dataclasses.replace(CONFIG, kind=kind)
    folder = make_model(tmp_path / "model", config)
    plain = load(folder / "anchor")
    nn.quantize(plain.anchor, group_size=32, bits=8)
    model = MemoryModel(plain.anchor, plain.tokenizer, plain.config, MemoryBank.open(folder / "bank"))
    model.select("none", "")
    before = _logits(model, "hello")
    model.select("0.0", "")
    assert mx.abs(_logits(model, "hello") - before).max() > 1e-4
    model.select("none", "")
    assert mx.array_equal(_logits(model, "hello"), before)


def test_generate_and_stream_agree(model: MemoryModel) -> None:
    response = model.generate("abc", memory="1.1", max_tokens=12)
    assert str(response) == response.text == "".join(model.stream("abc", memory="1.1", max_tokens=12))
    assert model.selection.blocks == ("1", "1.1")
    assert response.selection.blocks == ("1", "1.1")
    assert (response.prompt_tokens, response.finish_reason) == (3, "length")
    assert response.generation_tokens == 12
    assert response.tokens_per_second > 0


def test_plain_folder_has_no_memory(tmp_path: pathlib.Path) -> None:
    model = load(make_anchor(tmp_path / "anchor"))
    assert model.generate("abc", max_tokens=3).generation_tokens == 3
    for memory in ("generic", "fetched", "0.1"):
        with pytest.raises(BankError, match="no bank"):
            model.generate("abc", memory=memory)


def test_bad_memory_names(model: MemoryModel) -> None:
    with pytest.raises(HierMemError, match="unknown memory 'everything'"):
        model.generate("abc", memory="everything")
    with pytest.raises(BankError, match=r"no node 7\.1"):
        model.generate("abc", memory="7.1")


def test_missing_or_foreign(tmp_path: pathlib.Path) -> None:
    with pytest.raises(AnchorError, match="no model at"):
        load(tmp_path / "nowhere")
    folder = tmp_path / "model"
    make_anchor(folder / "anchor")
    make_bank(folder / "bank", make_anchor(tmp_path / "other", seed=1))
    with pytest.raises(AnchorMismatchError):
        load(folder)


def test_layers_that_the_anchor_lacks() -> None:
    from mlx_lm.models.llama import Model, ModelArgs

    anchor = Model(ModelArgs.from_dict(LLAMA))
    with pytest.raises(AnchorError, match="has 4 layers"):
        attach(anchor, dataclasses.replace(CONFIG, layers=(4,)))
    with pytest.raises(AnchorError, match="takes 32 values"):
        attach(anchor, dataclasses.replace(CONFIG, hidden=64))
    assert all("Memory" not in type(layer.mlp).__name__ for layer in anchor.layers)


def test_mixtures_of_experts_are_refused() -> None:
    from mlx_lm.models.qwen3_moe import Model, ModelArgs

    args = LLAMA | {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True,
        "max_position_embeddings": 64,
    }  # fmt: skip
    with pytest.raises(AnchorError, match=r"projection|experts"):
        attach(Model(ModelArgs.from_dict(args)), CONFIG)


def test_padding_is_never_sampled(tmp_path: pathlib.Path) -> None:
    model = load(make_anchor(tmp_path / "anchor"))
    tokens = model.tokens("abc")
    model.config["effective_vocab_size"] = 10
    assert all(response.token < 10 for response in model.responses(tokens, Sampling(8)))


def _alone(model: MemoryModel, session: Session) -> str:
    """The last reply, generated again from the whole history and an empty cache."""
    tokens = model.chat_tokens(session.messages[:-1])
    return "".join(response.text for response in model.responses(tokens, session.sampling))


def test_session_reuses_its_cache_on_the_same_path_only(model: MemoryModel) -> None:
    session = Session(model, memory="0.1", max_tokens=8)
    "".join(session.ask("first"))
    assert session.prefilled == len(model.chat_tokens(session.messages[:1]))
    assert "".join(session.ask("second")) == _alone(model, session)
    whole = len(model.chat_tokens(session.messages[:-1]))
    assert session.prefilled < whole / 2
    session.memory = "2.1"
    assert "".join(session.ask("third")) == _alone(model, session)
    assert session.prefilled == len(model.chat_tokens(session.messages[:-1]))


def test_session_survives_a_reply_broken_off(model: MemoryModel) -> None:
    session = Session(model, memory="0.1", max_tokens=40)
    reply = session.ask("first")
    said = next(reply) + next(reply)
    reply.close()
    assert session.messages[-1] == {"role": "assistant", "content": said}
    assert "".join(session.ask("second")) == _alone(model, session)


def test_session_forgets_a_turn_that_failed(model: MemoryModel) -> None:
    session = Session(model, memory="9.9")
    with pytest.raises(BankError):
        list(session.ask("first"))
    assert session.messages == []


def test_a_base_model_is_asked_as_its_bank_has_learnt(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank that `learn` made knows questions in a frame; with others a text is continued."""
    folder = make_model(tmp_path / "base")
    settings, manifest = folder / "anchor/tokenizer_config.json", folder / "bank/bank.json"
    settings.write_text(settings.read_text().replace("chat_template", "unused"))

    def ask(text: str, *options: str) -> list[object]:
        words = ["ask", "-m", str(folder), "--memory", "1.2", "-n", "8", "--json", *options, text]
        monkeypatch.setattr("sys.argv", ["hiermem", *words])
        with pytest.raises(SystemExit):
            cli.main()
        said = json.loads(capsys.readouterr().out)
        return [said["text"], said["prompt_tokens"]]

    model = load(folder)
    with pytest.raises(AnchorError, match="no chat template"):
        model.chat_tokens([{"role": "user", "content": "neon"}])
    assert ask("neon") == ask("neon", "--plain")

    manifest.write_text(manifest.read_text().replace('"recipe": {}', '"recipe": {"name": "learn"}'))
    framed = "Question: neon\nAnswer:"
    assert ask("neon") == ask(framed, "--plain")
    assert ask("neon") != ask("neon", "--plain")
    model = load_tiny(folder)
    talk = [{"role": "user", "content": "neon"}, {"role": "assistant", "content": " Ne"}]
    asked = [{"role": "system", "content": "Be brief."}, *talk, {"role": "user", "content": "iron"}]
    expected = model.tokens("Be brief.\n\nQuestion: neon\nAnswer: Ne\n\nQuestion: iron\nAnswer:")
    assert model.chat_tokens(asked) == expected
    form = package.describe_text(folder / "anchor", model.tokenizer, knows_questions=True)["chat"]
    assert model.tokens(render(form, asked)) == expected  # what an exported model's app asks
    assert package.describe_text(folder / "anchor", model.tokenizer)["chat"] is None
    with pytest.raises(ChatTemplateError, match="role tool"):
        model.chat_tokens([*talk, {"role": "tool", "content": "1"}])
    model.chat("neon", max_tokens=4)
    assert (
        model.selection.path == model.router.route("neon").path
    )  # by the words that were asked, without the frame
