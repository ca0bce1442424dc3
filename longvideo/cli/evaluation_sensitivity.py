"""`longvideo eval sensitivity`: where the error of NVFP4 comes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from longvideo.cli.evaluation_output import check_results_folder, check_target_below
from longvideo.cli.model_options import Device
from longvideo.cli.output import OUTPUT
from longvideo.cli.progress import items_progress
from longvideo.errors import UserError
from longvideo.files import write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.evaluation.sensitivity import Grouping, Operands, Variant
    from longvideo.model.transformer import CausalTransformer

KEEP_FILE = "keep.txt"
DTYPES = ("stored", "fp32")

Name = TypeVar("Name", bound=str)


def sensitivity(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="`tiny`, a model folder, or a Hugging Face id. It must not be packed."),
    ] = "tiny",
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that are in NVFP4 together: `kinds` for those of a kind, `blocks` for those of a block, or"
            " single `layers`. Can be repeated.  [default: kinds and blocks]"
        ),
    ] = None,
    operands: Annotated[
        list[str] | None,
        typer.Option(
            help="What is in NVFP4: `weights`, `inputs`, or `both`. Can be repeated.  [default: each of them for kinds,"
            " both for blocks and layers]"
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with a prompt in each line.  [default: captions of ShapeWorld for its models]"),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Number of prompts, with one video each.")] = 4,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of each video.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: the model's own]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the captions and the noise.")] = 0,
    budget: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Largest share of the multiply-adds that the layers in keep.txt have, with --by layers."
        ),
    ] = 0.05,
    dtype: Annotated[
        str,
        typer.Option(
            help="Number format of all that is not in NVFP4: `stored`, or `fp32`, which shows effects that are smaller"
            " than those of bf16."
        ),
    ] = "stored",
    device: Device = None,
    out: Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.json and keep.txt.")] = Path(
        "runs/sensitivity"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")] = False,
) -> None:
    """Measure which layers cause the error of NVFP4: some are in NVFP4, and the model's velocities are compared.

    Videos are generated with the model as it is. Then their denoising steps are repeated on the same inputs with some
    linear layers in NVFP4, and the steps of later chunks with these layers in NVFP4 in the clean pass of earlier ones.
    Prints tables in Markdown of the relative error of the velocity, largest first, and writes all numbers to
    `results.json`.

    With `--by layers` also writes `keep.txt`: names of the layers that cause the most error for their multiply-adds,
    most sensitive first, within the budget. `longvideo quantize --keep-file keep.txt` leaves them as they are.

    Example: `longvideo eval sensitivity tiny --by layers --num 2 --output runs/layers`
    """
    from dataclasses import replace

    import torch
    from rich.console import Console

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.evaluation.sensitivity import GROUPINGS, OPERANDS, SensitivityMeasurement
    from longvideo.evaluation.sensitivity_table import effect_table, report_record
    from longvideo.infer.options import SamplingOptions
    from longvideo.machine.devices import pick_device

    SamplingOptions(steps, seed=seed)
    groupings = chosen_names("--by", by or ("kinds", "blocks"), GROUPINGS)
    known_operands = chosen_names("--operands", operands or OPERANDS, OPERANDS)
    (chosen_dtype,) = chosen_names("--dtype", (dtype,), DTYPES)
    check_results_folder(out, overwrite=overwrite)
    check_target_below(out / KEEP_FILE, overwrite=overwrite)
    folder, where = ModelFolder.open(model), pick_device(device)
    if folder.is_packed:
        raise UserError(f"{folder.path} has packed 4-bit weights; use the folder that it was quantized from")
    settings = folder.settings if steps is None else replace(folder.settings, steps=steps)
    texts = choose_prompts(folder, prompts, num=num, seed=seed)
    transformer = folder.load_transformer(device=where, dtype=torch.float32 if chosen_dtype == "fp32" else None)
    variants = choose_variants(transformer, groupings, known_operands, all_of_each=operands is not None)
    text_encoder = folder.load_text_encoder(device=where)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with items_progress(console) as progress:
        bar = progress.add_task("groups of layers", total=len(variants))
        measurement = SensitivityMeasurement(
            transformer,
            folder.spec,
            settings,
            features=[text_encoder.encode([text, ""])[0] for text in texts],
            seeds=[seed * num + index for index in range(num)],
            num_chunks=chunks,
        )
        report = measurement.measure(variants, budget=budget, on_variant=lambda: progress.advance(bar))
    for grouping in ("model", *groupings):
        effects = [effect for effect in report.effects if effect.variant.group.by == grouping]
        typer.echo(effect_table(effects, report.sigmas) + "\n")
    if "layers" in groupings:
        write_text(out / KEEP_FILE, "".join(f"{name}\n" for name in report.kept))
    else:
        (out / KEEP_FILE).unlink(missing_ok=True)  # that of earlier results, which are replaced
    options = {
        "model": model,
        "prompts": texts,
        "chunks": chunks,
        "steps": settings.steps,
        "seed": seed,
        "dtype": dtype,
    }
    write_json(out / "results.json", {**options, "budget": budget, **report_record(report)})
    console.print(f"written: {out}", soft_wrap=True)


def chosen_names(option: str, names: Sequence[str], known: Sequence[Name]) -> list[Name]:
    """Return the known names that a user chose, in their order. Raises UserError for another name."""
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option} is {unknown[0]!r}; expected one of {', '.join(known)}")
    return [name for name in known if name in names]


def choose_variants(
    transformer: CausalTransformer, groupings: Sequence[Grouping], operands: Sequence[Operands], *, all_of_each: bool
) -> list[Variant]:
    """Return all layers in NVFP4, and the groups of each grouping.

    all_of_each: whether blocks and layers get all operands; otherwise the last ones.
    """
    from longvideo.evaluation.sensitivity import Variant, every_layer, layer_groups

    variants = [Variant(every_layer(transformer), own) for own in operands]
    for grouping in groupings:
        few = operands if all_of_each or grouping == "kinds" else operands[-1:]
        variants += [Variant(group, own) for group in layer_groups(transformer, grouping) for own in few]
    return variants


def choose_prompts(folder: ModelFolder, file: Path | None, *, num: int, seed: int) -> list[str]:
    """Return the first prompts of a file, or held-out captions of ShapeWorld.

    Raises UserError without a file if the model was trained on other data, and for a file with too few prompts, with
    more than the text of one shot in a line, or with more tokens than the model reads.
    """
    from longvideo.evaluation.shapeworld import build_tasks
    from longvideo.infer.prompt_rules import PromptRules
    from longvideo.infer.script import Script
    from longvideo.shapeworld.world import WORLD_NAME
    from longvideo.text.prompt_file import PromptLine, read_prompt_file

    if file is None:
        if folder.settings.trained_on != WORLD_NAME:
            raise UserError(
                f"{folder.path} was not trained on {WORLD_NAME}, whose captions are the default; use --prompts FILE"
            )
        return [task.prompts[0] for task in build_tasks(num, seconds=1, seed=seed)]
    lines = read_prompt_file(file)
    if len(lines) < num:
        raise UserError(f"{file} has {len(lines)} prompts; expected at least {num}, the number in --num")
    rules = PromptRules(folder.load_prompt_tokenizer(), folder.settings, guidance=None)
    for number, line in enumerate(lines[:num], 1):
        if line != PromptLine(line.shots[:1]):
            raise UserError(f"{file}:{number} is not a prompt alone; use a text file with a prompt in each line")
        rules.check_script(Script.from_prompts(line.shots, seconds=1))
    return [line.shots[0] for line in lines[:num]]
