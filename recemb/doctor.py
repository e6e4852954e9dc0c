"""``python -m recemb.doctor``: what is installed, whether it works on this machine, and what to do where it does not.

Every check runs, whatever the others found. Exit status 1 where recemb cannot train here, 0 otherwise; a warning names
something that only some settings need.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from recemb.versions import INSTALL, SUPPORTED, installed_versions, problems

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """Outcome of one check.

    Args:
        name: what was looked at.
        status: ``"failed"`` where recemb cannot train, ``"warning"`` where some settings are not to be had or slow.
        detail: what was found.
        advice: what to do about it; empty when ok.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def check_python() -> Iterator[Finding]:
    """The interpreter's version."""
    detail = f"{platform.python_version()} at {sys.executable}"
    supported = sys.version_info[:2] in ((3, 11), (3, 12))
    yield Finding("Python", "ok" if supported else "failed", detail, "" if supported else "use Python 3.11 or 3.12")


def check_versions() -> Iterator[Finding]:
    """Installed versions of torch, fbgemm and TorchRec, from package metadata."""
    installed = installed_versions()
    listed = ", ".join(f"{name} {version or '-'}" for name, version in installed.items())
    found = problems(installed)
    wanted = ", ".join(f"{name} {minor}" for name, minor in SUPPORTED.items())
    if found:
        yield Finding("versions", "failed", f"{listed}: {'; '.join(found)}", INSTALL)
    else:
        yield Finding("versions", "ok", f"{listed} (needed: {wanted})")


def check_imports() -> Iterator[Finding]:
    """Whether the three import: fbgemm's binaries load only beside the torch that they were built for."""
    for module in ("torch", "fbgemm_gpu", "torchrec"):
        start = time.perf_counter()
        try:
            importlib.import_module(module)
        except Exception as error:
            # OSError for a binary that does not load, ImportError, or whatever a half-installed package raises.
            yield Finding(f"import {module}", "failed", _first_line(error), INSTALL)
        else:
            yield Finding(f"import {module}", "ok", f"{time.perf_counter() - start:.1f} s")


def check_cpu() -> Iterator[Finding]:
    """Cores, torch's threads and the instruction set that its kernels use."""
    import torch

    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    detail = (
        f"{cores} cores for this process, {threads} torch threads, {torch.backends.cpu.get_cpu_capability()} kernels"
    )
    if threads > cores:
        advice = f"more threads than cores stall each other: set trainer.threads={cores} or OMP_NUM_THREADS={cores}"
        yield Finding("CPU", "warning", detail, advice)
    else:
        yield Finding("CPU", "ok", detail)


def check_cpu_kernels() -> Iterator[Finding]:
    """One training step of each fused optimizer on a tiny table, forward and backward, against the closed form."""
    importlib.import_module("fbgemm_gpu")
    for name in ("EXACT_SGD", "EXACT_ADAGRAD", "EXACT_ROWWISE_ADAGRAD"):
        yield _kernel_finding(name, "cpu", INSTALL)
    adam = _kernel_finding("ADAM", "cpu", "optimizer=adam takes the sparse path on CPU, 6 to 14x slower", "warning")
    if "not supported in CPU mode" in adam.detail:
        yield Finding(adam.name, "ok", "not fused, as expected: optimizer=adam takes the sparse path, 6 to 14x slower")
    else:
        yield adam


def check_cuda() -> Iterator[Finding]:
    """CUDA devices, and the fused optimizers on the first of them."""
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        yield Finding("CUDA", "ok", f"no device (torch is {built}); training runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("CUDA", "ok", f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    advice = 'the tables would train on the CPU only; for CUDA, in a fresh environment: pip install ".[cuda]"'
    for name in ("EXACT_SGD", "EXACT_ADAGRAD", "EXACT_ROWWISE_ADAGRAD", "ADAM"):
        yield _kernel_finding(name, "cuda", advice, failed="warning")


def check_compiler() -> Iterator[Finding]:
    """The C++ compiler that torch.compile needs on CPU."""
    candidates = [os.environ.get("CXX", ""), "g++", "clang++"]
    found = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if found is None:
        advice = "only trainer.compile=true needs one: install g++, or set CXX to the compiler"
        yield Finding("C++ compiler", "warning", "none found", advice)
    else:
        yield Finding("C++ compiler", "ok", f"{found} (for trainer.compile=true)")


def check_bfloat16() -> Iterator[Finding]:
    """Whether the CPU multiplies bfloat16 matrices in hardware, and how fast beside float32, measured."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    flags = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if capabilities.get(flag)]
    speed = _bfloat16_speed()
    detail = f"{', '.join(flags) or 'no instructions for it'}; matrix products run at {speed:.1f}x the speed of float32"
    if speed > 1.1:
        yield Finding("bfloat16 on CPU", "ok", detail)
    else:
        advice = "trainer.precision=bf16 would not be faster on this CPU: keep trainer.precision=fp32"
        yield Finding("bfloat16 on CPU", "warning", detail, advice)


def check_configs() -> Iterator[Finding]:
    """The config files that entry points compose."""
    from recemb.command_line import config_folder

    try:
        folder = config_folder()
    except FileNotFoundError as error:
        yield Finding("configs", "failed", str(error), "reinstall recemb")
    else:
        yield Finding("configs", "ok", f"{len(list(folder.rglob('*.yaml')))} files in {folder}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_versions,
    check_imports,
    check_cpu,
    check_cpu_kernels,
    check_cuda,
    check_compiler,
    check_bfloat16,
    check_configs,
)


def examine() -> Iterator[Finding]:
    """Runs every check; one that cannot run at all (torch does not import, say) counts as failed."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            yield Finding(name, "failed", f"could not be checked: {_first_line(error)}", "see the findings above")


def main() -> int:
    """Prints the findings; 1 where one of them failed, else 0."""
    findings: list[Finding] = []
    for finding in examine():
        print(f"[{finding.status:^7}] {finding.name}: {finding.detail}", flush=True)
        if finding.advice:
            known = any(finding.advice == earlier.advice for earlier in findings)
            print(f"          -> {'the same as above' if known else finding.advice}", flush=True)
        findings.append(finding)
    counts = {status: sum(finding.status == status for finding in findings) for status in ("warning", "failed")}
    verdict = "recemb cannot train here" if counts["failed"] else "recemb works here"
    print(f"{verdict}: {counts['failed']} failed, {counts['warning']} warnings")
    return 1 if counts["failed"] else 0


def _kernel_finding(optimizer: str, device: str, advice: str, failed: Status = "failed") -> Finding:
    name = f"fbgemm {optimizer} on {device}"
    try:
        error = _kernel_error(optimizer, device)
    except Exception as exception:
        return Finding(name, failed, _first_line(exception), advice)
    if error > 1e-4:
        return Finding(name, failed, f"a training step is off by {error:.1e} from the closed form", advice)
    return Finding(name, "ok", "forward and backward give the closed form")


def _kernel_error(optimizer: str, device: str) -> float:
    """Largest difference between one fused step on a table of 5 rows of 4 ones and its closed form."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    on_cpu = device == "cpu"
    spec = (5, 4, EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE)
    compute = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(*spec, compute)],
        optimizer=EmbOptimType[optimizer],
        learning_rate=0.5,
        eps=1e-8,
        device=torch.device(device),
    )
    weights = tables.split_embedding_weights()[0]
    weights.fill_(1.0)
    # Two bags, [1, 3] and [3]: row 3 is read twice, so its gradient is 2 in every value, that of row 1 is 1.
    ids, offsets = torch.tensor([1, 3, 3], device=device), torch.tensor([0, 2, 3], device=device)
    pooled = tables(ids, offsets)
    expected_pooled = torch.tensor([[2.0], [1.0]], device=device).expand(2, 4)
    pooled.sum().backward()
    # SGD subtracts 0.5 times the gradient; the adaptive ones first divide it by its root mean square, here itself.
    steps = (0.5, 1.0) if optimizer == "EXACT_SGD" else (0.5, 0.5)
    expected = torch.ones(5, 4, device=device)
    expected[1] -= steps[0]
    expected[3] -= steps[1]
    differences = (pooled.detach() - expected_pooled, weights - expected)
    return max(float(difference.abs().max()) for difference in differences)


def _bfloat16_speed() -> float:
    """How many times faster than float32 the CPU multiplies bfloat16 matrices, of the size of a DLRM's widest layer."""
    import torch

    def seconds(left: torch.Tensor, right: torch.Tensor) -> float:
        start = time.perf_counter()
        torch.mm(left, right)
        return time.perf_counter() - start

    operands = [
        (torch.ones(2048, 384, dtype=t), torch.ones(384, 256, dtype=t)) for t in (torch.float32, torch.bfloat16)
    ]
    threads = torch.get_num_threads()
    # Two threads measure the neighbours of a shared machine more than the instructions.
    torch.set_num_threads(1)
    try:
        times = [[seconds(*pair) for pair in operands] for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    return min(single for single, _ in times) / min(half for _, half in times)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


if __name__ == "__main__":
    sys.exit(main())
