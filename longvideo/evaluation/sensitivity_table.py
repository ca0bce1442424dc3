"""Tables in Markdown, and JSON, of the effects of NVFP4 on velocities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longvideo.evaluation.sensitivity import OPERANDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.evaluation.sensitivity import Effect, SensitivityReport


def effect_table(effects: Sequence[Effect], sigmas: Sequence[float]) -> str:
    """Return a table with a row for each group of layers, the largest error first.

    effects: those of one grouping. A row has the share of the multiply-adds and the error for each choice of operands
    in NVFP4, empty where it was not measured. For the last choice it also has the signal-to-quantization-noise ratio,
    and the errors in each step and through the clean pass. sigmas: noise level of each step.
    """
    operands = [known for known in OPERANDS if any(effect.variant.operands == known for effect in effects)]
    cells = {(effect.variant.group.name, effect.variant.operands): effect for effect in effects}
    heads = ["in NVFP4", "multiply-adds", *operands, "SQNR", *(f"noise {sigma:.2f}" for sigma in sigmas), "clean pass"]
    lines = [_row(heads), _row(["---"] * len(heads))]
    last = [effect for effect in effects if effect.variant.operands == operands[-1]]
    for effect in sorted(last, key=lambda effect: effect.error, reverse=True):
        name = effect.variant.group.name
        errors = [_percent(cells[name, known].error) if (name, known) in cells else "" for known in operands]
        ratio = "" if effect.decibels is None else f"{effect.decibels:.1f} dB"
        clean = "" if effect.clean_pass is None else _percent(effect.clean_pass)
        steps = map(_percent, effect.by_step)
        lines.append(_row([name, _percent(effect.share), *errors, ratio, *steps, clean]))
    return "\n".join(lines)


def report_record(report: SensitivityReport) -> dict[str, Any]:
    """Return a report for JSON. Errors are relative ones."""
    return {
        "noise_levels": list(report.sigmas),
        "effects": [_effect_record(effect) for effect in report.effects],
        "kept": list(report.kept),
    }


def _effect_record(effect: Effect) -> dict[str, Any]:
    group = effect.variant.group
    return {
        "by": group.by,
        "name": group.name,
        "operands": effect.variant.operands,
        "layers": list(group.layers),
        "multiply_adds": effect.share,
        "error": effect.error,
        "sqnr_db": effect.decibels,
        "steps": effect.steps,
        "by_step": list(effect.by_step),
        "clean_pass": effect.clean_pass,
    }


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
