"""Settings as a TOML file, and what is said of a wrong one."""

from __future__ import annotations

import pathlib
import tomllib
from dataclasses import replace

import pytest
from elements import SETTINGS
from typer.testing import CliRunner

from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.errors import HierMemError, OutputError, SettingsError
from mlx_hiermem.learn.settings import (
    AddSettings,
    CorpusSettings,
    LearnSettings,
    MemorySettings,
    PromptPair,
    TrainingSettings,
    TreeSettings,
    read_settings,
    settings_from_dict,
    settings_to_dict,
    write_settings,
)

VITAL = pathlib.Path(__file__).parents[1] / "apps" / "demo" / "vital"
OTHER = LearnSettings(
    corpus=CorpusSettings(field='a "quoted" field', title="Überschrift\n", any_language=True),
    tree=TreeSettings(branching=4, balance=1.5),
    memory=MemorySettings("lora-qk", (24, 8), (20, 25, 29)),
    self_study=False,
    training=TrainingSettings(epochs=3, rate=1e-5, objective="distillation"),
    licence="CC-BY-4.0",
    keep=True,
)


@pytest.mark.parametrize("settings", [LearnSettings(), OTHER])
def test_a_file_gives_back_what_was_written(settings: LearnSettings, tmp_path: pathlib.Path) -> None:
    write_settings(tmp_path / "learn.toml", settings)
    assert read_settings(tmp_path / "learn.toml") == settings
    assert settings_from_dict(settings_to_dict(settings)) == settings
    assert tomllib.loads((tmp_path / "learn.toml").read_text())["tree"]["leaves"] == 1


def test_questions_and_prompts_are_not_in_it(tmp_path: pathlib.Path) -> None:
    settings = LearnSettings(
        questions=(("What is gold?", "Gold"),), prompts=(PromptPair("Gold", "Gold is", " soft."),)
    )
    write_settings(tmp_path / "learn.toml", settings)
    assert read_settings(tmp_path / "learn.toml") == LearnSettings()


def test_a_file_may_say_little(tmp_path: pathlib.Path) -> None:
    (tmp_path / "learn.toml").write_text("heldout = 0\n[training]\nrate = 1\n")
    assert read_settings(tmp_path / "learn.toml") == LearnSettings(heldout=0.0, training=TrainingSettings(rate=1.0))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("corpus = 3", "corpus is a group of settings"),
        ("corpora = 3", "no setting corpora"),
        ("prompts = []", "no setting prompts"),
        ("[tree]\nbranches = 4", r"no setting tree\.branches.*branching"),
        ('[tree]\ndepth = "4"', r"tree\.depth is '4'. It must be a whole number"),
        ("[tree]\ndepth = 4.5", r"tree\.depth is 4\.5"),
        ("[tree]\ndepth = true", r"tree\.depth is True"),
        ("keep = 1", "keep is 1. It must be true or false"),
        ("[memory]\nsizes = [8, 2.5]", r"memory\.sizes is .* a list of numbers"),
        ("[memory]\nplacement = 3", r"memory\.placement is 3. It must be a text or a list of numbers"),
        ('[training]\nobjective = "guess"', "objective 'guess' is not known"),
        ("[study]\namount = 0", "amount must be more than 0"),
        ("[study]\ninvented = 0", "invented must be 1 or more, not 0"),
        ("[study]\ntried = 0", "tried must be 1 or more"),
        ("[study]\nfirst_tried = -1", "first_tried must be 0 or more"),
        ("[study]\nright = 0", "right must be more than 0, and 1 at most"),
        ("[study]\nright = 50", "right must be .* such as 0.5"),
        ("[corpus]\ntokens = 0", "tokens must be 1 or more"),
        ("[tree]\nbalance = 0.5", r"balance must be 1 or more, not 0\.5"),
        ("[tree]\nbalance = nan", "balance must be 1 or more"),
        ("[tree]\nbranching = -2", "branching must be 0 or more"),
        ("[tree]\ndepth = -1", "depth must be 0 or more"),
        ("[tree]\nleaves = 0", "leaves must be 1 or more"),
        ("heldout = 5", r"heldout must be 0 or more, and less than 1, not 5\.0\. It is a share: 0\.05"),
        ("heldout = 1", "heldout must be"),
        ("heldout = -0.1", "heldout must be"),
        ('teacher = "a"\nteacher_url = "http://127.0.0.1/v1"', "a model or a server, not both"),
        ('teacher_url = "127.0.0.1:1234"', "'127.0.0.1:1234' is no address"),
        ("keep = ", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, says: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "learn.toml").write_text(text)
    with pytest.raises(SettingsError, match=f"learn.toml.*{says}"):
        read_settings(tmp_path / "learn.toml")


def test_documents_are_added_to_a_leaf_at_least() -> None:
    with pytest.raises(HierMemError, match="leaves must be 1 or more"):
        AddSettings(leaves=0)


def test_a_missing_file_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.toml"):
        read_settings(tmp_path / "none.toml")


def test_each_setting_in_a_file_says_what_it_means(tmp_path: pathlib.Path) -> None:
    write_settings(tmp_path / "learn.toml", LearnSettings())
    lines = (tmp_path / "learn.toml").read_text().splitlines()
    assert "# How documents are read and cut into windows." in lines
    assert all(" # " in line for line in lines if " = " in line)


def test_the_command_writes_the_settings_in_force(tmp_path: pathlib.Path) -> None:
    """Options on the line come before the file, the file before the defaults."""
    (tmp_path / "mine.toml").write_text("[training]\nepochs = 4\nrate = 0.001\n")
    line = ["learn", "--config", "mine.toml", "--epochs", "9", "--no-self-study", "--cache", "2G", "--kind", "kv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        done = CliRunner().invoke(app, [*line, "--write-config", "all.toml"])
        assert done.exit_code == 0, done.output
        assert isinstance(CliRunner().invoke(app, [*line, "--write-config", "all.toml"]).exception, OutputError)
    training = TrainingSettings(epochs=9, rate=0.001, states_bytes=2_000_000_000)
    wanted = LearnSettings(self_study=False, memory=MemorySettings("kv"), training=training)
    assert read_settings(tmp_path / "all.toml") == wanted


def test_of_several_files_the_last_comes_first(tmp_path: pathlib.Path) -> None:
    (tmp_path / "first.toml").write_text("keep = true\n[memory]\nkind = 'kv'\nsizes = [8]\n[tree]\nleaves = 2\n")
    (tmp_path / "second.toml").write_text("[memory]\nsizes = [4]\n")
    found = read_settings(tmp_path / "first.toml", tmp_path / "second.toml")
    assert found == LearnSettings(keep=True, memory=MemorySettings("kv", (4,)), tree=TreeSettings(leaves=2))
    (tmp_path / "second.toml").write_text("keep = 2\n")
    with pytest.raises(SettingsError, match=r"second\.toml: keep is 2"):
        read_settings(tmp_path / "first.toml", tmp_path / "second.toml")


def test_the_large_articles_differ_in_size_alone() -> None:
    usual, large = read_settings(VITAL / "learn.toml"), read_settings(VITAL / "learn.toml", VITAL / "large.toml")
    assert large.memory.sizes == (64, 64) != usual.memory.sizes
    assert replace(large, memory=usual.memory) == usual


def test_the_elements_settings_are_settings() -> None:
    assert read_settings(SETTINGS).tree == TreeSettings(branching=4, leaves=1, seed=166)
