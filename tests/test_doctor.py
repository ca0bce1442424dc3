"""`longvideo doctor`: every operation has a backend, every other a reason, and the checks can fail."""

from __future__ import annotations

import json

import pytest
import torch

from longvideo import doctor
from longvideo.cli.main import main

CPU = torch.device("cpu")


def test_every_operation_has_a_backend_and_every_other_a_reason() -> None:
    rows = doctor.operations(CPU)
    assert len(rows) == 7
    for row in rows:
        assert row.backend and row.rejected
        assert all(backend != row.backend and reason for backend, reason in row.rejected.items())


def test_the_checks_pass_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--self-test", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["checks"]) == len(doctor.CHECKS) and all(check["passed"] for check in report["checks"])
    assert report["machine"]["torch"] == torch.__version__


def test_a_failing_check_ends_with_code_one(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    wrong = doctor.reference.encode
    monkeypatch.setattr(doctor.reference, "encode", lambda values: wrong(values) ^ 1)
    assert main(["doctor", "--device", "cpu", "--self-test"]) == 1
    assert "FAIL" in capsys.readouterr().out
