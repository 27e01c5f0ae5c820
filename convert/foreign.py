"""Checkpoints of other software, known by their files' names, are refused with the tool that exports them.

Each holds a model whose tensors have other names or orders than in Hugging Face's form, which is read here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mlx_hiermem.errors import CheckpointError


@dataclass(frozen=True)
class Form:
    """Names of its files, what it is, and how to export it to Hugging Face's form."""

    files: str
    what: str
    export: str


FORMS = (
    Form("consolidated.*.pth", "Meta's form of Llama", "transformers 4's convert_llama_weights_to_hf.py"),
    Form("consolidated*.safetensors", "Mistral's own form", "transformers 4's convert_mistral_weights_to_hf.py"),
    Form(
        "lit_model.pth",
        "a LitGPT checkpoint",
        "`litgpt convert_from_litgpt`",
    ),
    Form("zero_to_fp32.py", "a DeepSpeed checkpoint", "`python zero_to_fp32.py . OUT --safe_serialization` in it"),
    Form("*.nemo", "a NeMo checkpoint", "NeMo's `export_ckpt` with the target hf"),
    Form("tf_model.h5", "a TensorFlow model", "transformers 4 (from_pretrained with from_tf, save_pretrained)"),
    Form("flax_model.msgpack", "a Flax model", "transformers 4 (from_pretrained with from_flax)"),
)


def refuse_foreign(where: str, names: Iterable[str]) -> None:
    """Raises CheckpointError where one of the names gives away another software's checkpoint."""
    for name in sorted(names):
        for form in FORMS:
            if fnmatchcase(name, form.files):
                raise CheckpointError(
                    f"{where} is {form.what} ({name})",
                    f"Export it to Hugging Face's form with {form.export}, or take its repository there.",
                )
