"""`hiermem convert` and `hiermem verify`: a trained checkpoint in, a model folder and the proof out."""

from __future__ import annotations

import json
import pathlib

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import console, notes, progress_bar, renamed, size

EARLIER = typer.Option(None, "--memory", hidden=True)  # of --memories: elsewhere --memory says which one is wanted


def convert(
    src: str = typer.Argument(..., help="Hugging Face folder or hub id, OpenLM checkpoint, or GGUF file."),
    out: pathlib.Path = typer.Argument(..., help="Folder to make: anchor/ and, with --memories, bank/."),
    memories: pathlib.Path | None = typer.Option(None, help="Trained memory checkpoint (.safetensors or .pt)."),
    memory: pathlib.Path | None = EARLIER,
    quantize: int | None = typer.Option(None, help="Quantise the anchor to 4 or 8 bits, with mlx-lm."),
    key_map: pathlib.Path | None = typer.Option(None, help="TOML table from foreign tensor names to ours."),
    config: pathlib.Path | None = typer.Option(None, help="OpenLM: model config JSON or the run's params.txt."),
    tokenizer: str | None = typer.Option(None, help="OpenLM: folder or hub id of the tokenizer."),
    resume: bool = typer.Option(False, "--resume", help="Go on after an interruption."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUT once the new one is complete."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Turn a trained checkpoint into an MLX anchor, and its memories into a bank.

    Example: `hiermem convert SmolLM2-135M my-model --memories memories.safetensors`
    """
    from mlx_hiermem.convert import pipeline

    memories = memories or _renamed(memory)
    if quantize not in (None, 4, 8):
        raise typer.BadParameter("choose 4 or 8 bits", param_hint="--quantize")
    with progress_bar("converting", show=not as_json) as progress:
        report = pipeline.convert(
            src,
            out,
            memory=memories,
            quantize=quantize,
            key_map=key_map,
            config=config,
            tokenizer=tokenizer,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        console.print_json(json.dumps(report.to_json(), ensure_ascii=False))
        return
    for warning in report.warnings:
        notes.print(f"note: {warning}", style="yellow", markup=False, soft_wrap=True)
    anchor = f"{report.architecture}, {report.parameters / 1e6:.1f} M parameters, {report.dtype}"
    console.print(f"anchor   {anchor}, {size(report.anchor_bytes)}", markup=False)
    if report.blocks:
        console.print(f"bank     {report.blocks} blocks, {size(report.bank_bytes)}", markup=False)
    console.print(f"written  {out}", markup=False, soft_wrap=True)
    checkpoint = f" --memories {memories}" if memories else ""
    command = f"hiermem verify {out} --against {src}{checkpoint}"
    console.print(f"check    {command}", style="dim", markup=False, soft_wrap=True)


def verify(
    first_word: str = models.FIRST_WORD,
    model: str = models.MODEL,
    against: str | None = typer.Option(None, help="The source it was converted from: compares with PyTorch."),
    memories: pathlib.Path | None = typer.Option(None, help="The memory checkpoint it was converted from."),
    memory: pathlib.Path | None = EARLIER,
    config: pathlib.Path | None = typer.Option(None, help="OpenLM: the config that was given to convert."),
    key_map: pathlib.Path | None = typer.Option(None, help="The key map that was given to convert."),
    coreml: bool = typer.Option(False, "--coreml", help="MODEL is an exported folder; its source a model folder."),
    coreai: bool = typer.Option(False, "--coreai", help="The same for an export for Core AI."),
    prompts: int = typer.Option(4, min=1, max=20, help="Of an export: how many prompts are continued."),
    text: pathlib.Path | None = typer.Option(
        None, help="Of an export: a file; choices in its first 2 000 tokens are compared."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the receipt instead of a table."),
) -> None:
    """Check digests, shapes and finite values; with --against, parity with the source. Writes receipt.json.

    With --coreml, an export is run: by Core ML on a Mac, elsewhere by an interpreter of its saved program. With
    --coreai by Apple's runtime, which is an interpreter elsewhere, too.

    Example: `hiermem verify my-model --against SmolLM2-135M --memories memories.safetensors`
    """
    from mlx_hiermem.errors import VerificationError

    memories = memories or _renamed(memory)
    if coreml and coreai:
        raise typer.BadParameter("an export is for one of them", param_hint="--coreml, --coreai")
    exported = "mlx-hiermem-coreml" if coreml else "mlx-hiermem-coreai" if coreai else ""
    if exported and (memories or config or key_map):
        raise typer.BadParameter("an export has its memory in it", param_hint="--memories, --config, --key-map")
    if text and not exported:
        raise typer.BadParameter("is for an export", param_hint="--text")
    name = models.chosen(first_word, model)
    folder = models.folder_of(name)
    with progress_bar("verifying", unit="checks", show=not as_json) as progress:
        if exported:
            from mlx_hiermem.convert.export.verify import Options, verify_export

            receipt = verify_export(folder, Options(against, prompts, text, exported), progress)
        else:
            from mlx_hiermem.convert.verify import verify as run

            receipt = run(folder, against, memories, config=config, key_map=key_map, progress=progress)
    if as_json:
        console.print_json(json.dumps(receipt.to_json(), ensure_ascii=False))
    else:
        from rich.table import Table

        table = Table("check", "figure", "bound", "", box=None, header_style="dim")
        for check in receipt.checks:
            mark = "[green]ok[/]" if check.passed else "[red]failed[/]"
            table.add_row(check.name, check.figure, check.bound, mark)
        console.print(table)
        console.print(f"written  {folder / 'receipt.json'}", markup=False, soft_wrap=True)
    if not receipt.passed:
        failed = [f"{check.name} ({check.figure})" for check in receipt.checks if not check.passed]
        raise VerificationError(f"{name} did not pass: {', '.join(failed)}", "receipt.json has the figures.")


def _renamed(checkpoint: pathlib.Path | None) -> pathlib.Path | None:
    if checkpoint:
        renamed("--memory CHECKPOINT", "--memories CHECKPOINT")
    return checkpoint
