"""`longvideo doctor`: what this machine can run, and whether its numbers are right."""

from __future__ import annotations

import json
from typing import Annotated

import typer

EXIT_FAILED = 1


def doctor(
    device: Annotated[str | None, typer.Option(help="`cuda`, `cuda:1` or `cpu`; the GPU if there is one.")] = None,
    self_test: Annotated[bool, typer.Option("--self-test", help="Run small numeric checks on the device.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the machine, the versions, and what would run each operation and why nothing else.

    With --self-test small numeric checks run too: a round trip, kernels against the definition, a product, a gradient,
    the 4-bit cache. Ends with code 1 when one fails.

    Example: `longvideo doctor --self-test`
    """
    from dataclasses import asdict

    from longvideo import __version__
    from longvideo.doctor import machine, operations
    from longvideo.doctor import self_test as run_checks
    from longvideo.infer.pipeline import pick_device

    where = pick_device(device)
    facts = {"longvideo": __version__, **machine(where)}
    rows, checks = operations(where), run_checks(where) if self_test else []
    if as_json:
        report = {"machine": facts, "operations": [asdict(row) for row in rows], "checks": [asdict(c) for c in checks]}
        typer.echo(json.dumps(report, indent=2))
    else:
        for name, value in facts.items():
            typer.echo(f"{name:<24}{value}")
        for row in rows:
            typer.echo(f"\n{row.name}: {row.backend}")
            for backend, reason in row.rejected.items():
                typer.echo(f"    not {backend}: {reason}")
        if checks:
            typer.echo()
        for check in checks:
            typer.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.measured}")
    if not all(check.passed for check in checks):
        raise typer.Exit(EXIT_FAILED)
