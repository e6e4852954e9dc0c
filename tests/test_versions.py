from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from recemb import versions

GOOD: dict[str, str | None] = {
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0",
    "fbgemm-gpu": versions.SHIM_VERSION,
    "fbgemm-gpu-cpu": "1.8.0",
}
CUDA = {**GOOD, "torch": "2.13.0+cu130", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None}


@pytest.mark.parametrize(
    "installed",
    [
        pytest.param(GOOD, id="cpu with the shim"),
        pytest.param({**GOOD, "fbgemm-gpu": None}, id="cpu, TorchRec installed without its dependencies"),
        pytest.param({**GOOD, "torch": "2.13.1", "torchrec": "1.8.2"}, id="patch releases"),
        pytest.param({**GOOD, "torch": "2.13.0+cu130"}, id="CPU tables beside a CUDA build of torch"),
        pytest.param(CUDA, id="cuda"),
        pytest.param({**CUDA, "torch": "2.13.0"}, id="cuda, torch without a local version"),
    ],
)
def test_combinations_that_work_have_no_problems(installed: dict[str, str | None]) -> None:
    assert versions.problems(installed) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "2.15.0"}, "torch 2.15.0 is installed, 2.13 is needed"),
        ({"torch": "2.1.3"}, "torch 2.1.3 is installed, 2.13 is needed"),
        ({"torch": "2.130.0"}, "torch 2.130.0 is installed, 2.13 is needed"),
        ({"torch": None}, "torch is not installed"),
        ({"torchrec": "1.9.2"}, "torchrec 1.9.2 is installed, 1.8 is needed"),
        ({"torchrec": None}, "torchrec is not installed"),
        ({"fbgemm-gpu-cpu": "1.9.0"}, "fbgemm-gpu-cpu 1.9.0 is installed, 1.8 is needed"),
        ({"fbgemm-gpu-cpu": None}, "fbgemm-gpu-cpu is not installed"),
        ({"fbgemm-gpu": "1.8.0"}, "both installed, into the same folder"),
        (
            {"fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None},
            "needs a CUDA build of torch, torch 2.13.0+cpu is a CPU build",
        ),
        ({"fbgemm-gpu": "1.6.0", "fbgemm-gpu-cpu": None, "torch": "2.13.0"}, "fbgemm-gpu 1.6.0 is installed, 1.8 is"),
    ],
)
def test_each_wrong_version_is_named(change: dict[str, str | None], message: str) -> None:
    (found,) = versions.problems({**GOOD, **change})
    assert message in found


def test_a_wrong_combination_gives_one_error_that_names_the_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**GOOD, "torch": "2.15.0", "torchrec": "1.9.2"}
    monkeypatch.setattr(versions, "installed_versions", lambda: wrong)
    with pytest.raises(ImportError) as error:
        versions.require_supported_versions()
    message = str(error.value)
    for words in ("torch 2.15.0", "torchrec 1.9.2", "torch 2.13, fbgemm 1.8", "torchrec 1.8", "recemb.doctor"):
        assert words in message


def test_installed_versions_report_a_missing_distribution_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "fbgemm-gpu":
            raise metadata.PackageNotFoundError(name)
        return f"{name} 1"

    monkeypatch.setattr(metadata, "version", version)
    assert versions.installed_versions() == {
        "torch": "torch 1",
        "torchrec": "torchrec 1",
        "fbgemm-gpu": None,
        "fbgemm-gpu-cpu": "fbgemm-gpu-cpu 1",
    }


def test_importing_recemb_imports_neither_torch_nor_torchrec() -> None:
    code = "import recemb, sys; print([m for m in ('torch', 'torchrec', 'fbgemm_gpu', 'hydra') if m in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"


def test_wrong_versions_stop_the_import_but_not_the_doctor(tmp_path: Path) -> None:
    # Metadata earlier on sys.path hides the installed one.
    wrong = tmp_path / "torchrec-1.9.2.dist-info"
    wrong.mkdir()
    (wrong / "METADATA").write_text("Metadata-Version: 2.1\nName: torchrec\nVersion: 1.9.2\n")
    imported = run_python("-c", "import recemb.hashing", path=tmp_path)
    assert imported.returncode == 1
    assert (
        imported.stderr.strip()
        .splitlines()[-1]
        .startswith("ImportError: torchrec 1.9.2 is installed, 1.8 is needed. recemb needs torch 2.13, fbgemm 1.8")
    )
    doctor = run_python("-m", "recemb.doctor", path=tmp_path)
    assert doctor.returncode == 1
    assert "[failed ] versions: " in doctor.stdout and "torchrec 1.9.2 is installed, 1.8 is needed" in doctor.stdout


def run_python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the checkout, with ``path`` first among the places to import from."""
    root = Path(__file__).parents[1]
    environment = {"PYTHONPATH": f"{path or root}:{root}", "OMP_NUM_THREADS": "1", "PATH": ""}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
