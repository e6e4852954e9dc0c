"""The project's own files: pins that agree with each other, imports that are declared, the house rules."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import recemb
from recemb import command_line, versions

ROOT = Path(__file__).parents[1]
PACKAGES = ("recemb", "data_pipelines")
# Module -> the distribution that provides it, where the names differ.
DISTRIBUTION_OF = {"hydra": "hydra-core", "fbgemm_gpu": "fbgemm-gpu-cpu", "yaml": "pyyaml", "sklearn": "scikit-learn"}
# Used without an import: pandas' and torch's way of reaching them.
IMPORTED_BY_OTHERS = {"tensorboard": "torch.utils.tensorboard"}
MAX_LINES = 400
MAX_BYTES = 500_000


def project(folder: Path = ROOT) -> dict[str, object]:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def pins(requirements: object) -> dict[str, str]:
    assert isinstance(requirements, list)
    return {requirement_name(text): text[re.match(r"[A-Za-z0-9._-]+", text).end() :] for text in requirements}  # type: ignore[union-attr]


@cache
def tracked_files() -> tuple[Path, ...]:
    """Files that git knows; all files below the packages, configs and tests where this is no git checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [path for folder in (*PACKAGES, "configs", "tests") for path in (ROOT / folder).rglob("*")]
    return tuple(path for path in paths if path.is_file() and "__pycache__" not in path.parts)


def imported_modules(folder: str) -> set[str]:
    """Top-level names of everything that a package imports, at module level or inside functions."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - set(PACKAGES)


def test_every_import_is_declared_and_every_dependency_is_used() -> None:
    declared = project()
    extras = declared["optional-dependencies"]
    assert isinstance(extras, dict)
    available = set(pins(declared["dependencies"])) | set(pins(extras["cpu"]))
    modules = set().union(*(imported_modules(package) for package in PACKAGES))
    used = {DISTRIBUTION_OF.get(module, module) for module in modules}
    assert used - available == set(), "imported, not declared in pyproject.toml"
    sources = "\n".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    # Tests of a study import its modules by their bare names, as its scripts do.
    studies = {path.stem for path in (ROOT / "experiments").rglob("*.py")}
    tested = {DISTRIBUTION_OF.get(module, module) for module in imported_modules("tests") - studies}
    assert tested - available - set(pins(extras["test"])) == {"tests"}, "imported by tests, not in the extra test"
    indirect = {name for name, marker in IMPORTED_BY_OTHERS.items() if marker in sources}
    assert set(pins(declared["dependencies"])) - used - indirect == set(), "declared, not used"


def test_pins_shim_and_guard_name_the_same_versions() -> None:
    declared, shim = project(), project(ROOT / "tools" / "fbgemm-cpu-shim")
    extras = declared["optional-dependencies"]
    assert isinstance(extras, dict)
    cpu, cuda = pins(extras["cpu"]), pins(extras["cuda"])
    fbgemm, torchrec = f"=={versions.SUPPORTED['fbgemm']}.*", f"=={versions.SUPPORTED['torchrec']}.*"
    assert pins(declared["dependencies"])["torch"] == f"=={versions.SUPPORTED['torch']}.*"
    assert cpu == {"torchrec": torchrec, "fbgemm-gpu-cpu": fbgemm, "fbgemm-gpu": f"=={versions.SHIM_VERSION}"}
    assert cuda == {"torchrec": torchrec, "fbgemm-gpu": fbgemm}
    assert (shim["name"], shim["version"]) == ("fbgemm-gpu", versions.SHIM_VERSION)
    assert shim["requires-python"] == declared["requires-python"]
    shim_pin = pins(shim["dependencies"])["fbgemm-gpu-cpu"]
    assert shim_pin == f"=={versions.SHIM_VERSION.split('+')[0]}"
    constraints = pins([line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line])
    assert constraints["fbgemm-gpu-cpu"] == shim_pin
    assert constraints["torch"].startswith(f"=={versions.SUPPORTED['torch']}.")
    assert constraints["torchrec"].startswith(f"=={versions.SUPPORTED['torchrec']}.")
    # A pin of the CUDA build, or of a CPU build of torch, would make the file useless to the other half of the users.
    assert "fbgemm-gpu" not in constraints and "+" not in constraints["torch"]


def test_constraints_cover_every_dependency() -> None:
    declared = project()
    extras = declared["optional-dependencies"]
    assert isinstance(extras, dict)
    needed = set(pins(declared["dependencies"])).union(*(pins(extras[name]) for name in ("cpu", "test", "dev")))
    constrained = pins([line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line])
    assert needed - {"recemb", "fbgemm-gpu"} - set(constrained) == set()


def test_readme_names_the_commands_and_the_versions() -> None:
    readme = (ROOT / "README.md").read_text()
    for words in ("make train", "make test", ".[cpu]", ".[cuda]", "fbgemm-cpu-shim", "recemb.doctor"):
        assert words in readme
    for name, minor in versions.SUPPORTED.items():
        assert re.search(rf"{name}[^\n]*{re.escape(minor)}", readme, re.IGNORECASE), name


def test_readme_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(examples) == 3
    monkeypatch.chdir(tmp_path)
    serving, built, compressed = examples
    # What is served has to be trained and saved first.
    for example in (built, compressed, serving):
        names: dict[str, Any] = {}
        exec(example, names)
        assert type(names["model"]).__name__ == "DLRM"
        if example is built:
            recemb.save(recemb.convert(names["model"]), "models/ctr")


def test_readmes_results_are_those_of_the_committed_cells() -> None:
    command = [sys.executable, "experiments/readme_table.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_configs_are_found_beside_the_package() -> None:
    assert command_line.config_folder() in (ROOT / "configs", ROOT / "recemb" / "configs")


@pytest.mark.parametrize(
    "path", [p for p in tracked_files() if p.suffix == ".py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_source_file_keeps_the_house_rules(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES, f"{len(lines)} lines, the limit is {MAX_LINES}: split it by subject"
    assert path.stem not in {"utils", "helpers", "common", "misc"}, "a name that says nothing"


def test_files_are_small_and_name_no_place_of_one_machine() -> None:
    # In pieces, so that this file does not contain what it looks for.
    registry = re.compile("index" + "-url|find" + "-links|" + r"https?://[^ ]*/(simple|packages)/")
    machine = re.compile("(^|[^A-Za-z0-9_.])/(" + "tmp|work|root|farm|home/[a-z]+)/")
    found = []
    for path in tracked_files():
        name = path.relative_to(ROOT)
        if path.stat().st_size > MAX_BYTES:
            found.append(f"{name}: {path.stat().st_size} bytes, the limit is {MAX_BYTES}")
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if registry.search(line):
                found.append(f"{name}:{number}: names a package registry")
            if path.suffix in (".py", ".yaml", ".md", ".toml") and machine.search(line):
                found.append(f"{name}:{number}: a path of one machine")
    assert found == []
