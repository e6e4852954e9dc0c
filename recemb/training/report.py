"""``report.md`` and its plots: a finished run for people, written from what programs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recemb.evaluation.evaluator import Evaluation
from recemb.evaluation.plots import reliability_plot
from recemb.files import write_atomically
from recemb.memory import MemoryReport
from recemb.training.metrics_log import read_metrics
from recemb.training.plots import loss_plot, table_bytes_plot
from recemb.training.progress import duration

# Physical tables listed in the report; memory.json has all.
_MOST_TABLES = 40
_STAGE_FIGURES = {"steps": "steps", "kept_rows": "rows kept", "kept_values": "values kept", "bytes": "bytes"}


def summary_table(results: Mapping[str, Any]) -> str:
    """The figures of a run that people ask for first, one a line."""
    if "test" not in results:
        return _stage_lines(results)
    test, embedding, train = results["test"], results["embedding"], results["train"]
    optimum = results["data"].get("optimum", {})
    users = test.get("users", {"gauc": None})
    rows = [
        ("test AUC", f"{test['auc']:.5f}", f"best possible {optimum['auc']:.5f}" if optimum else ""),
        *([] if users["gauc"] is None else [("test GAUC", f"{users['gauc']:.5f}", _left_out(users))]),
        ("test log loss", f"{test['logloss']:.5f}", f"best possible {optimum['logloss']:.5f}" if optimum else ""),
        ("embedding bytes", f"{embedding['bytes']:,}", embedding["method"]),
        *_against_full(embedding),
        ("samples/s", f"{train['samples_per_second']:,.0f}", f"{train['samples']:,} samples"),
        ("data", results["data"]["source"], results["data"]["path"]),
        ("run", results["run"], ""),
    ]
    names = max(len(name) for name, _, _ in rows)
    # The last line's path would push the remarks of the others off the screen.
    values = max(len(value) for _, value, remark in rows if remark or value != results["run"])
    return "\n".join(f"{name:<{names}}  {value:>{values}}  {remark}".rstrip() for name, value, remark in rows)


def _against_full(embedding: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    # Ids that are all hashes have no full tables.
    if not embedding["full_bytes"]:
        return [("bytes of full tables", "none", "ids are hashes")]
    return [("bytes of full tables", f"{embedding['full_bytes']:,}", ""), ("ratio", f"{embedding['ratio']:.2f}x", "")]


def _left_out(users: Mapping[str, Any]) -> str:
    return f"{users['num_users']:,} users, {users['num_users_left_out']:,} of one class left out"


def _stage_lines(results: Mapping[str, Any]) -> str:
    """Stages of a search that has not come to the test split."""
    lines = []
    for stage in results["stages"]:
        shown = [f"{stage['name']:<12}", duration(stage["seconds"])]
        shown += [f"{stage[key]:,} {text}" for key, text in _STAGE_FIGURES.items() if key in stage]
        if "validation" in stage:
            shown.append(f"validation AUC {stage['validation']['auc']:.5f}")
        lines.append("  ".join(shown))
    return "\n".join([*lines, f"{'run':<12}  {results['run']}"])


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    evaluation: Evaluation,
    memory: MemoryReport,
    *,
    metrics: list[dict[str, Any]] | None = None,
    sections: Sequence[str] = (),
) -> None:
    """Write ``loss.png``, ``table_bytes.png``, ``reliability.png`` and ``report.md`` into ``folder``.

    Args:
        folder: of the run.
        results: what results.json holds.
        evaluation: of the test split.
        memory: bytes of the tables.
        metrics: lines of the training that the report is about; those of ``folder`` where None.
        sections: Markdown that follows the test metrics.
    """
    lines = read_metrics(folder) if metrics is None else metrics
    loss_plot(lines, folder / "loss.png")
    table_bytes_plot(memory, folder / "table_bytes.png")
    reliability_plot(
        evaluation, folder / "reliability.png", title=f"Reliability: {results['data']['source']}, test split"
    )
    parts = [
        _title(results),
        _warning(results),
        f"```\n{summary_table(results)}\n```",
        "## Test split\n\nLooked at once, with the weights of the best validation.\n\n```\n"
        + evaluation.table()
        + "\n```",
        "![reliability](reliability.png)",
        *sections,
        _training(results, lines),
        "![loss](loss.png)",
        _memory(memory, results["embedding"]["training_bytes"]),
        "![bytes per table](table_bytes.png)",
        "## Again\n\n`config.yaml` is the whole config, `environment.json` the command, packages and machine, "
        "`metrics.jsonl` every logged step. Other metrics of this model:\n\n"
        f"```\npython -m recemb.evaluate checkpoint={results['run']}\n```",
    ]
    write_atomically(folder / "report.md", "\n\n".join(part for part in parts if part) + "\n")


def _title(results: Mapping[str, Any]) -> str:
    embedding = results["embedding"]
    return f"# {embedding['method']} at {embedding['ratio']:.1f}x, test AUC {results['test']['auc']:.5f}"


def _warning(results: Mapping[str, Any]) -> str:
    if not results["data"]["source"].startswith("synthetic"):
        return ""
    return (
        "**Trained on a synthetic log.** Its figures compare methods with each other and with the known optimum only."
    )


def _training(results: Mapping[str, Any], lines: list[dict[str, Any]]) -> str:
    train, data = results["train"], results["data"]
    ended = "early stopping ended it" if train["stopped_early"] else "it ran to its end"
    text = (
        f"## Training\n\n{train['steps']:,} steps, {train['samples']:,} samples ({train['epochs']:.2f} epochs of "
        f"{data['rows']['train']:,} rows) in {duration(train['seconds'])} on {train['device']} ({train['precision']}); "
        f"{ended}. {train['dense_parameters']:,} dense parameters. Seed {results['seed']}.\n\n"
        "| step | validation AUC | validation log loss | |\n|---:|---:|---:|---|\n"
    )
    rows = [
        f"| {line['step']:,} | {line['auc']:.5f} | {line['logloss']:.5f} | "
        f"{'best' if line['step'] == results['validation']['best_step'] else ''} |"
        for line in lines
        if line["split"] == "validation"
    ]
    return text + "\n".join(rows)


def _memory(memory: MemoryReport, training_bytes: int) -> str:
    text = (
        f"## Memory\n\n{memory.serving_bytes:,} bytes to serve: {memory.table_bytes:,} of tables, "
        f"{memory.index_bytes:,} of maps and salts, {memory.dense_bytes:,} of the method's dense layers. "
        f"Full tables would take {memory.full_bytes:,}. Training held {training_bytes:,}, "
        "optimizer state included."
        "\n\n"
        "| physical table | rows | dim | bytes |\n|---|---:|---:|---:|\n"
    )
    tables = sorted(memory.tables, key=lambda table: -table.bytes)
    rows = [
        f"| {table.name} | {table.num_embeddings:,} | {table.embedding_dim} | {table.bytes:,} |"
        for table in tables[:_MOST_TABLES]
    ]
    if len(tables) > _MOST_TABLES:
        rows.append(
            f"| {len(tables) - _MOST_TABLES} smaller ones | | | {sum(t.bytes for t in tables[_MOST_TABLES:]):,} |"
        )
    return text + "\n".join(rows)
