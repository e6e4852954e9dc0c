"""The versions of torch, fbgemm and TorchRec that work together, and the check that they are the installed ones.

fbgemm's binaries fit one minor release of torch, but its package does not say so: pip installs any combination, which
then fails with "Could not load this library", or at the first lookup. The check reads package metadata only: it takes
milliseconds and imports none of the three.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

# Minor release of each; a patch release of the same minor is accepted.
SUPPORTED: Mapping[str, str] = {"torch": "2.13", "fbgemm": "1.8", "torchrec": "1.8"}
# Version of the metadata-only package that stands for fbgemm-gpu where fbgemm-gpu-cpu is installed.
SHIM_VERSION = "1.8.0+cpu.shim"
DISTRIBUTIONS = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")

INSTALL = (
    "recemb needs torch 2.13, fbgemm 1.8 (fbgemm-gpu-cpu, or fbgemm-gpu for CUDA) and torchrec 1.8 together. "
    "In a fresh virtual environment, from a checkout of recemb: "
    'pip install "torch==2.13.0" ./tools/fbgemm-cpu-shim ".[cpu]", or with CUDA: pip install ".[cuda]". '
    "`python -m recemb.doctor` shows what is installed."
)


def installed_versions() -> dict[str, str | None]:
    """Version of each distribution that matters, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def problems(installed: Mapping[str, str | None]) -> list[str]:
    """What is wrong with a combination of versions, in words; empty when it works.

    Args:
        installed: version (or None) of each of ``DISTRIBUTIONS``.
    """
    found = []
    for name in ("torch", "torchrec"):
        found += _wrong_version(name, installed[name], SUPPORTED[name])
    gpu, cpu = installed["fbgemm-gpu"], installed["fbgemm-gpu-cpu"]
    real_gpu = gpu is not None and not gpu.endswith(".shim")
    if real_gpu and cpu is not None:
        found.append(
            f"fbgemm-gpu {gpu} and fbgemm-gpu-cpu {cpu} are both installed, into the same folder: uninstall both"
        )
    elif real_gpu:
        found += _wrong_version("fbgemm-gpu", gpu, SUPPORTED["fbgemm"])
        if str(installed["torch"]).endswith("+cpu"):
            found.append(f"fbgemm-gpu {gpu} needs a CUDA build of torch, torch {installed['torch']} is a CPU build")
    else:
        found += _wrong_version("fbgemm-gpu-cpu", cpu, SUPPORTED["fbgemm"])
    return found


def require_supported_versions() -> None:
    """Does nothing where the installed versions fit together.

    Raises:
        ImportError: they do not; says which, and names the combination that works and how to install it.
    """
    found = problems(installed_versions())
    if found:
        raise ImportError(f"{'; '.join(found)}. {INSTALL}")


def _wrong_version(name: str, version: str | None, minor: str) -> list[str]:
    if version is None:
        return [f"{name} is not installed"]
    if not version.startswith(f"{minor}."):
        return [f"{name} {version} is installed, {minor} is needed"]
    return []
