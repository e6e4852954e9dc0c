"""The warning about bfloat16 follows the measured ratio, and never comes on a GPU."""

from __future__ import annotations

import logging

import pytest
import torch

from recemb.training import precision


@pytest.mark.parametrize(("speedup", "warns"), [(0.5, True), (2.0, False)])
def test_slow_bfloat16_is_named_with_the_measured_ratio(
    speedup: float, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", lambda: speedup)
    with caplog.at_level(logging.WARNING):
        precision.warn_where_bf16_is_slow(torch.device("cpu"))
    assert ("0.50 times" in caplog.text) == warns


def test_a_gpu_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> float:
        raise AssertionError

    monkeypatch.setattr(precision, "bf16_speedup", fail)
    precision.warn_where_bf16_is_slow(torch.device("cuda"))


def test_the_ratio_is_positive() -> None:
    assert precision.bf16_speedup() > 0
