"""`hiermem convert` and `hiermem verify`: a trained checkpoint in, a model folder and the proof out."""

from __future__ import annotations

import json
import pathlib

import typer

from mlx_hiermem.apps.cli.display import console, notes, progress_bar, size
from mlx_hiermem.apps.cli.use import MODEL


def convert(
    src: str = typer.Argument(..., help="Hugging Face folder or hub id, OpenLM checkpoint, or GGUF file."),
    out: pathlib.Path = typer.Argument(..., help="Folder to make: anchor/ and, with --memory, bank/."),
    memory: pathlib.Path | None = typer.Option(None, help="Trained memory checkpoint (.safetensors or .pt)."),
    quantize: int | None = typer.Option(None, help="Quantise the anchor to 4 or 8 bits, with mlx-lm."),
    key_map: pathlib.Path | None = typer.Option(None, help="TOML table from foreign tensor names to ours."),
    config: pathlib.Path | None = typer.Option(None, help="OpenLM: model config JSON or the run's params.txt."),
    tokenizer: str | None = typer.Option(None, help="OpenLM: folder or hub id of the tokenizer."),
    resume: bool = typer.Option(False, "--resume", help="Go on after an interruption."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUT once the new one is complete."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Turn a trained checkpoint into an MLX anchor, and its memories into a bank.

    Example: `hiermem convert SmolLM2-135M my-model --memory memories.safetensors`
    """
    from mlx_hiermem.convert import pipeline

    if quantize not in (None, 4, 8):
        raise typer.BadParameter("choose 4 or 8 bits", param_hint="--quantize")
    with progress_bar("converting", show=not as_json) as progress:
        report = pipeline.convert(
            src,
            out,
            memory=memory,
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
    checkpoint = f" --memory {memory}" if memory else ""
    command = f"hiermem verify {out} --against {src}{checkpoint}"
    console.print(f"check    {command}", style="dim", markup=False, soft_wrap=True)


def verify(
    model: pathlib.Path = MODEL,
    against: str | None = typer.Option(None, help="The source it was converted from: compares with PyTorch."),
    memory: pathlib.Path | None = typer.Option(None, help="The memory checkpoint it was converted from."),
    config: pathlib.Path | None = typer.Option(None, help="OpenLM: the config that was given to convert."),
    key_map: pathlib.Path | None = typer.Option(None, help="The key map that was given to convert."),
    coreml: bool = typer.Option(False, "--coreml", help="MODEL is an exported folder; its source a model folder."),
    prompts: int = typer.Option(4, min=1, max=20, help="With --coreml: so many prompts are written on."),
    text: pathlib.Path | None = typer.Option(None, help="With --coreml: choices in 2 000 tokens of a file, too."),
    as_json: bool = typer.Option(False, "--json", help="Print the receipt instead of a table."),
) -> None:
    """Check digests, shapes and finite values; with --against, parity with the source. Writes receipt.json.

    With --coreml, an export is run: by Core ML on a Mac, elsewhere by an interpreter of its saved program.

    Example: `hiermem verify my-model --against SmolLM2-135M --memory memories.safetensors`
    """
    from mlx_hiermem.errors import VerificationError

    if coreml and (memory or config or key_map):
        raise typer.BadParameter("an export has its memory in it", param_hint="--memory, --config, --key-map")
    if text and not coreml:
        raise typer.BadParameter("is for an export", param_hint="--text")
    with progress_bar("verifying", unit="checks", show=not as_json) as progress:
        if coreml:
            from mlx_hiermem.convert.coreml.verify import Options, verify_export

            receipt = verify_export(model, Options(against, prompts, text), progress)
        else:
            from mlx_hiermem.convert.verify import verify as run

            receipt = run(model, against, memory, config=config, key_map=key_map, progress=progress)
    if as_json:
        console.print_json(json.dumps(receipt.to_json(), ensure_ascii=False))
    else:
        from rich.table import Table

        table = Table("check", "figure", "bound", "", box=None, header_style="dim")
        for check in receipt.checks:
            mark = "[green]ok[/]" if check.passed else "[red]failed[/]"
            table.add_row(check.name, check.figure, check.bound, mark)
        console.print(table)
        console.print(f"written  {model / 'receipt.json'}", markup=False, soft_wrap=True)
    if not receipt.passed:
        failed = [f"{check.name} ({check.figure})" for check in receipt.checks if not check.passed]
        raise VerificationError(f"{model} did not pass: {', '.join(failed)}", "receipt.json has the figures.")
