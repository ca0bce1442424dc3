"""Compare a result of `longvideo bench stream --output` with a baseline: compare_stream.py BASELINE RESULT [RATIO].

Exits with 1 when a time is longer than RATIO times that of the baseline, 1.1 if not given, and with 2 when the two were
not measured on the same GPU with the same settings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TIMES = ("step_ms", "clean_pass_ms", "decode_ms", "chunk_s_p50", "chunk_s_p95")
SETTINGS = ("model", "steps", "guidance", "size", "window_frames", "decode_share", "formats")
RATIO = 1.1


def differences(baseline: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Return a line for each setting in which a result differs from its baseline."""
    pairs = [(name, baseline[name], result[name]) for name in SETTINGS]
    pairs.append(("device", baseline["environment"]["device"], result["environment"]["device"]))
    return [f"{name} is {value!r}; expected {expected!r}" for name, expected, value in pairs if value != expected]


def ratios(baseline: dict[str, Any], result: dict[str, Any]) -> dict[str, float]:
    """Return each time divided by that of the baseline."""
    return {name: result[name] / baseline[name] for name in TIMES}


def main(arguments: list[str]) -> int:
    """Print the ratios and return the exit code."""
    baseline, result = (json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments[:2])
    limit = float(arguments[2]) if len(arguments) > 2 else RATIO
    if lines := differences(baseline, result):
        print(f"these results cannot be compared: {'; '.join(lines)}", file=sys.stderr)
        return 2
    slow = 0
    for name, ratio in ratios(baseline, result).items():
        is_slow = ratio > limit
        slow += is_slow
        print(f"{name}: {result[name]:g}, {ratio:.3f} of {baseline[name]:g}{' TOO SLOW' if is_slow else ''}")
    return min(slow, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
