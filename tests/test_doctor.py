from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator

import pytest
import torch

from recemb import doctor
from recemb.doctor import Finding


def only(checks: Iterator[Finding]) -> Finding:
    (finding,) = checks
    return finding


def test_everything_that_training_needs_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    for words in (
        "Python: ",
        "versions: torch 2.13",
        "import torchrec",
        "fbgemm EXACT_ROWWISE_ADAGRAD on cpu",
        "configs",
    ):
        assert f"[  ok   ] {words}" in printed
    assert "recemb works here: 0 failed" in printed


def test_one_failed_check_makes_the_exit_status_one_and_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_kernels() -> Iterator[Finding]:
        yield Finding("first", "ok", "fine")
        raise OSError("Could not load this library\nand more")

    def check_last() -> Iterator[Finding]:
        yield Finding("last", "warning", "slow", "buy a faster one")
        yield Finding("very last", "warning", "slower", "buy a faster one")

    monkeypatch.setattr(doctor, "CHECKS", (check_kernels, check_last))
    assert doctor.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "[  ok   ] first: fine",
        "[failed ] kernels: could not be checked: OSError: Could not load this library",
        "          -> see the findings above",
        "[warning] last: slow",
        "          -> buy a faster one",
        "[warning] very last: slower",
        "          -> the same as above",
        "recemb cannot train here: 1 failed, 2 warnings",
    ]


def test_binaries_that_do_not_load_are_named_with_the_good_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> object:
        if name == "fbgemm_gpu":
            raise OSError("Could not load this library: fbgemm_gpu_tbe_index_select.so")
        return object()

    monkeypatch.setattr(importlib, "import_module", import_module)
    findings = {finding.name: finding for finding in doctor.check_imports()}
    assert findings["import torch"].status == "ok"
    broken = findings["import fbgemm_gpu"]
    assert broken.status == "failed" and "fbgemm_gpu_tbe_index_select.so" in broken.detail
    assert "torch 2.13, fbgemm 1.8" in broken.advice


def test_a_kernel_that_computes_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_kernel_error", lambda optimizer, device: 0.25)
    findings = list(doctor.check_cpu_kernels())
    assert findings[0].status == "failed" and "off by 2.5e-01" in findings[0].detail


def test_bfloat16_is_measured_on_one_thread_and_the_threads_come_back() -> None:
    threads = torch.get_num_threads()
    assert 0.01 < doctor._bfloat16_speed() < 100
    assert torch.get_num_threads() == threads


def test_kernels_are_not_tried_where_fbgemm_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> object:
        raise OSError("Could not load this library")

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_cpu_kernels,))
    finding = only(doctor.examine())
    assert finding == Finding(
        "cpu kernels", "failed", "could not be checked: OSError: Could not load this library", "see the findings above"
    )


def test_fused_adam_is_not_expected_on_cpu() -> None:
    *fused, adam = doctor.check_cpu_kernels()
    assert [finding.status for finding in fused] == ["ok"] * 3
    assert adam.status == "ok" and "not fused, as expected" in adam.detail


@pytest.mark.parametrize(("speed", "status"), [(2.0, "ok"), (0.5, "warning")])
def test_slow_bfloat16_is_a_warning_that_names_the_setting(
    speed: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_bfloat16_speed", lambda: speed)
    finding = only(doctor.check_bfloat16())
    assert finding.status == status and f"{speed:.1f}x the speed of float32" in finding.detail
    assert ("trainer.precision=fp32" in finding.advice) == (status == "warning")


def test_a_missing_compiler_is_a_warning_that_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    finding = only(doctor.check_compiler())
    assert finding.status == "warning" and "trainer.compile=true" in finding.advice


def test_missing_configs_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def config_folder() -> None:
        raise FileNotFoundError("no configs: looked for train.yaml")

    monkeypatch.setattr("recemb.command_line.config_folder", config_folder)
    finding = only(doctor.check_configs())
    assert finding.status == "failed" and "looked for train.yaml" in finding.detail
