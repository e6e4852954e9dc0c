"""Speed of the loader beside a bare pyarrow scan of the same columns, at one core, in one run.

    python experiments/data_loading/benchmark.py --out experiments/data_loading/results/one_core.json

Writes a Criteo-shaped encoded data set to a temporary folder, then reads it in turns with: pyarrow row group by row
group (decoding only), pyarrow in batches of the same size, the loader in file order, the loader shuffled. Reports the
median of the ratios of each round, by wall clock and by processor seconds (the loader's thread included), and the peak
memory of a process of its own for each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recemb.data.manifest import CategoricalFeature, Manifest, NumericFeature, Split, describe_file
from recemb.data.parquet import ParquetLoader

# Criteo Kaggle's cardinalities, capped at one million.
CARDINALITIES: tuple[int, ...] = (1460, 583, 1_000_000, 1_000_000, 305, 24, 12517, 633, 3, 93145, 5683, 1_000_000, 3194)
CARDINALITIES += (27, 14992, 1_000_000, 10, 5652, 2173, 4, 1_000_000, 18, 15, 286181, 105, 142572)
NUM_NUMERIC = 13
ROW_GROUP_ROWS = 65_536
BATCH_SIZE = 4096


def write_data_set(root: Path, rows: int, *, use_dictionary: bool) -> Manifest:
    """Skewed ids, counts under log1p, in the format of the preparation (zstd level 1)."""
    generator = np.random.default_rng(0)
    root.mkdir(parents=True)
    (root / "train").mkdir()
    path = root / "train" / "part-00000.parquet"
    writer: pq.ParquetWriter | None = None
    for _ in range(rows // ROW_GROUP_ROWS):
        table = _row_group(generator)
        if writer is None:
            writer = pq.ParquetWriter(
                path, table.schema, compression="zstd", compression_level=1, use_dictionary=use_dictionary
            )
        writer.write_table(table)
    assert writer is not None
    writer.close()
    manifest = Manifest(
        root=root,
        source="synthetic",
        label="label",
        numeric=tuple(NumericFeature(f"I{position + 1}") for position in range(NUM_NUMERIC)),
        categorical=tuple(CategoricalFeature(f"C{k + 1}", size) for k, size in enumerate(CARDINALITIES)),
        splits={"train": Split((describe_file(root, path),))},
    )
    manifest.save()
    return manifest


def _row_group(generator: np.random.Generator) -> pa.Table:
    columns = {"label": generator.integers(0, 2, ROW_GROUP_ROWS).astype(np.int8)}
    for position in range(NUM_NUMERIC):
        counts = np.floor(generator.lognormal(2, 2, ROW_GROUP_ROWS))
        columns[f"I{position + 1}"] = np.log1p(counts).astype(np.float32)
    for position, size in enumerate(CARDINALITIES):
        # The inverse of a density of 1 / (1 + id): Zipf with exponent 1.
        ids = (size + 1.0) ** generator.random(ROW_GROUP_ROWS) - 1
        columns[f"C{position + 1}"] = np.minimum(ids, size - 1).astype(np.int32)
    return pa.table(columns)


def contenders(manifest: Manifest) -> dict[str, Callable[[], None]]:
    path = manifest.files("train")[0]

    def scan_row_groups() -> None:
        with pq.ParquetFile(path) as file:
            for index in range(file.metadata.num_row_groups):
                file.read_row_group(index, use_threads=False)

    def scan_batches() -> None:
        with pq.ParquetFile(path) as file:
            for _ in file.iter_batches(batch_size=BATCH_SIZE, use_threads=False):
                pass

    in_order = ParquetLoader(manifest, "train", batch_size=BATCH_SIZE)
    shuffled = ParquetLoader(manifest, "train", batch_size=BATCH_SIZE, shuffle=True)

    def load(loader: ParquetLoader) -> None:
        for _ in loader:
            pass

    return {
        "pyarrow_row_groups": scan_row_groups,
        "pyarrow_batches": scan_batches,
        "loader_in_order": lambda: load(in_order),
        "loader_shuffled": lambda: load(shuffled),
    }


def measure(manifest: Manifest, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Wall clock and processor seconds of every contender in every round, after one that does not count."""
    runs = contenders(manifest)
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                seconds[name]["wall"].append(wall)
                seconds[name]["cpu"].append(cpu)
    return seconds


def peak_memory(root: Path, name: str) -> int:
    """Peak resident bytes that one contender adds to a fresh process with everything imported."""
    command = [sys.executable, __file__, "--peak-memory-of", name, "--root", str(root)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _peak_bytes(run: Callable[[], None]) -> int:
    """What ``run`` adds to the resident bytes of this process at its peak (Linux)."""
    # 5 sets the high-water mark back to what is resident now; importing torch had gone higher.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def summarise(manifest: Manifest, rounds: int, cores: int) -> dict[str, object]:
    seconds = measure(manifest, rounds)
    rows = manifest.split("train").rows
    summary: dict[str, object] = {"bytes_per_row": manifest.split("train").files[0].bytes / rows}
    for name, runs in seconds.items():
        entry: dict[str, object] = {
            "rows_per_second": rows / statistics.median(runs["wall"]),
            "cpu_seconds_per_million_rows": statistics.median(runs["cpu"]) / rows * 1e6,
            "peak_bytes_over_imports": peak_memory(manifest.root, name),
            "seconds": runs,
        }
        for baseline in ("pyarrow_row_groups", "pyarrow_batches"):
            for clock in ("wall", "cpu"):
                ratios = [base / own for base, own in zip(seconds[baseline][clock], runs[clock], strict=True)]
                entry[f"{clock}_ratio_to_{baseline}"] = statistics.median(ratios)
        summary[name] = entry
    summary["cores"] = cores
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32 * ROW_GROUP_ROWS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1, help="processor cores this process may use")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--peak-memory-of")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Reading and handing out share the core: nothing hides behind a second one.
    cores = sorted(os.sched_getaffinity(0))[-options.cores :]
    os.sched_setaffinity(0, cores)
    if options.peak_memory_of:
        sys.stdout.write(f"{_peak_bytes(contenders(Manifest.load(options.root))[options.peak_memory_of])}\n")
        return
    result: dict[str, object] = {
        "rows": options.rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS,
        "batch_size": BATCH_SIZE,
        "rounds": options.rounds,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "pyarrow": pa.__version__},
    }
    with tempfile.TemporaryDirectory() as folder:
        for encoding in ("dictionary", "plain"):
            manifest = write_data_set(Path(folder) / encoding, options.rows, use_dictionary=encoding == "dictionary")
            result[encoding] = summarise(manifest, options.rounds, len(cores))
    text = json.dumps(result, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
