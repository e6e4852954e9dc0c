"""Command-line options that all pipelines share, and how their errors reach the terminal."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipelines.splitting import GENERAL_KINDS, SplitKind, SplitRule

# A value seen once in train teaches its vector nothing that generalises; the public benchmarks take 2 to 10.
DEFAULT_MIN_COUNT = 2


def base_parser(program: str, description: str, raw_help: str, num_raw: int | None = None) -> argparse.ArgumentParser:
    """A parser with RAW (``num_raw`` of them; None: one or more), --out, --overwrite and --workers."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", nargs=num_raw or "+", type=Path, metavar="RAW", help=raw_help)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to make; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that lies at DIR")
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: all cores)")
    return parser


def add_split_options(
    parser: argparse.ArgumentParser, default: SplitKind | None, choices: Sequence[SplitKind] = GENERAL_KINDS
) -> None:
    """Add --split, --fractions and --seed; ``default`` None: it depends on other options (see ``split_rule``)."""
    meanings = {
        "random": "every row by chance",
        "time": "oldest rows train, newest test (by time column, else in the order given)",
        "last-day": "all days but the last train, its first half validates, its second tests",
        "users": "every user with all rows by chance",
    }
    group = parser.add_argument_group("split into train, validation and test")
    group.add_argument(
        "--split",
        choices=choices,
        default=default,
        help="; ".join(f"{kind}: {meanings[kind]}" for kind in choices)
        + (" (default: %(default)s)" if default else " (default: as the protocol)"),
    )
    group.add_argument(
        "--fractions",
        type=parse_fractions,
        metavar="A:B:C",
        help="shares of train, validation and test, as weights (default: 8:1:1; for the last seventh in halves 12:1:1)",
    )
    group.add_argument("--seed", type=int, help="of splits by chance (default: 0)")


def add_min_count_option(parser: argparse.ArgumentParser) -> None:
    """Add --min-count."""
    parser.add_argument(
        "--min-count",
        type=int,
        metavar="N",
        help=f"train rows a value needs for an id of its own; rarer ones share id 0 (default: {DEFAULT_MIN_COUNT})",
    )


def split_rule(arguments: argparse.Namespace, default: SplitKind = "random") -> SplitRule:
    """The split that the options ask for; ``default`` where --split has none."""
    return SplitRule.of(arguments.split or default, arguments.fractions, arguments.seed)


def parse_fractions(text: str) -> tuple[float, float, float]:
    """``"8:1:1"`` -> (8.0, 1.0, 1.0)."""
    try:
        train, validation, test = (float(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"three numbers like 8:1:1 are required, got {text!r}") from None
    return train, validation, test


def run_command(parser: argparse.ArgumentParser, prepare: Callable[[], object]) -> None:
    """Run a preparation; errors of the user's making end it with one line and status 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        prepare()
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; nothing was kept\n")


def as_paths(raw_paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """One path or several -> list of Path."""
    if isinstance(raw_paths, str | Path):
        raw_paths = [raw_paths]
    return [Path(path) for path in raw_paths]
