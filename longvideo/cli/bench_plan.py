"""`longvideo bench plan`: estimate memory and time of a training step on GPUs that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longvideo.cli.output import OUTPUT
from longvideo.cli.training import Arguments
from longvideo.errors import UserError
from longvideo.files import write_json

if TYPE_CHECKING:
    from longvideo.train.clips.plan import Rates, StepPlan

DEFAULT_GPUS = (8, 16, 32, 64)


def plan(
    arguments: Arguments = None,
    rate: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="TFLOP/S",
            help="Rate of one GPU, as `longvideo train clips CONFIG --dry-run 3` prints it on yours.",
        ),
    ] = ...,  # pyright: ignore[reportArgumentType] - typer's sign for a required option
    gpus: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of GPUs. Repeat the option. [default: 8, 16, 32, 64]")
    ] = None,
    bandwidth: Annotated[
        float, typer.Option(min=1, metavar="GB/S", help="What a GPU sends in a second to those that share its clip.")
    ] = 450.0,
    network: Annotated[
        float, typer.Option(min=1, metavar="GB/S", help="What a GPU sends in a second to all others.")
    ] = 50.0,
    out: Annotated[Path | None, typer.Option(*OUTPUT, help="JSON file to write too.")] = None,
) -> None:
    """Estimate memory and time of a step of `train clips` on GPUs that are not here, without any GPU.

    Memory is that of the estimate before training. Time is arithmetic: the operations of a step at the given rate, then
    the bytes of the exchange in a clip and those of gradients and weights, at the given bandwidths, nothing
    overlapped. The bandwidths in the defaults are one direction of NVLink on an H200, and a network of 400 Gbit/s for
    each GPU. A rate that was measured on several GPUs already contains their exchange.

    Example: `longvideo bench plan wan/ar_64s --rate 290 --gpus 8 --gpus 32`
    """
    from rich.console import Console
    from rich.table import Table

    from longvideo.cli.config import SCHEMAS
    from longvideo.config.loading import find_config, load_config
    from longvideo.train.clips.plan import Rates, plan_step
    from longvideo.training.memory import GIB

    if out is not None and out.is_dir():
        raise UserError(f"{out} is a folder; expected a file, such as plan.json")
    words = list(arguments or ["wan/ar"])
    files = [find_config(word) for word in words if "=" not in word]
    config: Any = load_config(SCHEMAS["train clips"](), files, [word for word in words if "=" in word])
    rates = Rates(rate * 1e12, bandwidth * 1e9, network * 1e9)
    table = Table(
        "stage", "GPUs", "for a clip", "passes", "memory", "arithmetic", "exchange", "gradients", "step", "run"
    )
    rows: list[dict[str, Any]] = []
    for number, stage in enumerate(config.stages):
        for count in gpus or DEFAULT_GPUS:
            step = plan_step(config, stage, count)
            record = _record(number, step, rates, stage.steps)
            rows.append(record)
            table.add_row(
                str(number),
                str(count),
                str(step.sequence),
                str(step.passes),
                f"{step.memory.total / GIB:.1f} GiB",
                *(f"{seconds:.1f} s" for seconds in step.seconds(rates)),
                f"{record['step_s']:.1f} s",
                f"{record['run_h']:.1f} h",
            )
    Console(width=120).print(table)
    typer.echo(
        f"estimated, not measured: {rate:g} TFLOP/s a GPU, {bandwidth:g} GB/s to the GPUs of a clip,"
        f" {network:g} GB/s to all, nothing overlapped"
    )
    if out is not None:
        write_json(out, {"rate": rate, "bandwidth": bandwidth, "network": network, "plans": rows})


def _record(stage: int, step: StepPlan, rates: Rates, steps: int) -> dict[str, Any]:
    seconds = step.seconds(rates)
    return {
        "stage": stage,
        "gpus": step.gpus,
        "sequence": step.sequence,
        "passes": step.passes,
        "memory_bytes": round(step.memory.total),
        "operations": step.operations,
        "sequence_bytes": step.sequence_bytes,
        "network_bytes": step.network_bytes,
        "step_s": sum(seconds),
        "run_h": sum(seconds) * steps / 3600,
    }
