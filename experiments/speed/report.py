"""Writes the tables of README.md from results/*.json: python experiments/speed/report.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
LIBRARIES = ("DeepCTR-Torch DeepFM", "FuxiCTR DLRM")
TORCHREC = "TorchRec DLRM on one raw kernel"
RAW = "one raw fbgemm kernel"


def main() -> None:
    path = FOLDER / "README.md"
    text = path.read_text()
    tables = (("training", training_table), ("kernels", kernel_table), ("profile", profile_table))
    for name, render in tables:
        result = FOLDER / "results" / f"{name}.json"
        if result.is_file():
            text = _replace(text, name, render(json.loads(result.read_text())))
    path.write_text(text)


def training_table(document: dict[str, Any]) -> str:
    """One line per contender; ratios are of medians of the same run, CPU time in brackets."""
    rows = document["rows"]
    best = {
        key: max(rows[name][key]["median"] for name in LIBRARIES if name in rows)
        for key in ("samples_per_second", "samples_per_cpu_second")
    }
    lines = [
        _origin(document),
        "",
        "| | samples/s (range) | samples per CPU second (range) | to best library: CPU time (wall) "
        "| to TorchRec | AUC (range) | peak RSS |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        wall, cpu = row["samples_per_second"], row["samples_per_cpu_second"]
        ratio = f"**{cpu['median'] / best['samples_per_cpu_second']:.2f}**"
        ratio += f" ({wall['median'] / best['samples_per_second']:.2f})"
        to_torchrec = cpu["median"] / rows[TORCHREC]["samples_per_cpu_second"]["median"]
        lines.append(
            f"| {name} | {_rate(wall)} | {_rate(cpu)} | {ratio} | {to_torchrec:.2f} | {row['auc']['mean']:.4f} "
            f"({row['auc']['min']:.4f}-{row['auc']['max']:.4f}) | {row['peak_rss_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def kernel_table(document: dict[str, Any]) -> str:
    """One line per contender, one column per case: milliseconds and the ratio to the raw kernel."""
    cases = document["cases"]
    heads = [f"D={case['dim']}, B={case['batch_size']}" for case in cases]
    lines = [_origin(document), "", f"| ms per step (ratio) | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in cases[0]["rows"]:
        cells = []
        for case in cases:
            row = case["rows"].get(name)
            cells.append("not run" if row is None else f"{row['ms_median']:.1f} ({row['ratio_to_raw']:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def profile_table(document: dict[str, Any]) -> str:
    """One line per part of a step, one column per variant."""
    variants = document["variants"]
    lines = [
        _origin(document),
        "",
        f"| ms per step (share) | {' | '.join(variants)} |",
        "|---" * (len(variants) + 1) + "|",
    ]
    for part in next(iter(variants.values())):
        cells = []
        for parts in variants.values():
            step = sum(value for name, value in parts.items() if not name.startswith("loader"))
            cells.append(f"{parts[part]:.1f} ({100 * parts[part] / step:.0f}%)")
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _origin(document: dict[str, Any]) -> str:
    machine, git = document["machine"], document["git"]
    state = " with uncommitted changes" if git["dirty"] else ""
    return (
        f"{document['made'][:10]}, {machine['cpu']} ({machine['cpu_family_model']}; {', '.join(machine['simd'])}), "
        f"{machine['cores']} cores, commit {git['sha'][:10]}{state}."
    )


def _rate(figure: dict[str, float]) -> str:
    return f"{figure['median'] / 1e3:.1f}k ({figure['min'] / 1e3:.1f}-{figure['max'] / 1e3:.1f})"


def _replace(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: begin, made by report.py -->", f"<!-- {name}: end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    main()
