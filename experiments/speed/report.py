"""Writes the tables of README.md from results/*.json: python experiments/speed/report.py"""

from __future__ import annotations

import json
import statistics
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
    """A table for each optimizer, then what merging equal ids gains where a method can leave it."""
    cases = document["cases"]
    commit = cases[-1]["git"]["sha"]
    older: dict[str, set[str]] = {}
    for name, row in ((name, row) for case in cases for name, row in case["rows"].items()):
        if row["git"]["sha"] != commit:
            older.setdefault(row["git"]["sha"], set()).add(name)
    parts = [_origin(cases[-1])]
    parts += [f"Of commit {sha[:10]}: {', '.join(sorted(names))}." for sha, names in older.items()]
    for optimizer, title in (("rowwise_adagrad", "Row-wise Adagrad"), ("sgd", "SGD")):
        if chosen := [case for case in cases if case["optimizer"] == optimizer]:
            parts += [f"**{title}**", _optimizer_table(chosen)]
    return "\n\n".join([*parts, _merge_table(cases)])


def _optimizer_table(cases: list[dict[str, Any]]) -> str:
    """One line per contender, one column per case: milliseconds and the ratio to the raw kernel beside it, its goal."""
    heads = [f"D={case['dim']}, B={case['batch_size']}" for case in cases]
    lines = [f"| ms per step (ratio) | goal | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    raw = [statistics.median(row["raw_ms_median"] for row in case["rows"].values()) for case in cases]
    lines.append(f"| {RAW} | | {' | '.join(f'{milliseconds:.1f} (1.00)' for milliseconds in raw)} |")
    for name in dict.fromkeys(name for case in cases for name in case["rows"]):
        rows = [case["rows"].get(name) for case in cases]
        goal = next(row["goal"] for row in rows if row is not None)
        cells = [_kernel_cell(row) for row in rows]
        lines.append(f"| {name} | {'' if goal is None else goal} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _kernel_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    ratio = f"{row['ratio_to_raw']:.2f}"
    missed = row["goal"] is not None and row["ratio_to_raw"] > row["goal"]
    return f"{row['ms_median']:.1f} ({f'**{ratio}**' if missed else ratio})"


def _merge_table(cases: list[dict[str, Any]]) -> str:
    """How many times as long a step takes that composes every occurrence of an id."""
    suffix = ", ids not merged"
    lines = ["| gain of composing distinct ids once | distinct | tensor_train | deep_hash |", "|---|---|---|---|"]
    for case in cases:
        rows = case["rows"]
        gains = [
            f"{rows[name + suffix]['ms_median'] / rows[name]['ms_median']:.1f}x" if name + suffix in rows else "not run"
            for name in ("tensor_train", "deep_hash")
        ]
        if gains != ["not run"] * len(gains):
            head = f"D={case['dim']}, B={case['batch_size']} | {100 * case['distinct_fraction']:.0f}%"
            lines.append(f"| {head} | {' | '.join(gains)} |")
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
