"""The manifest: what an encoded data set holds, and the check that its files are still the ones it describes.

A data set is a directory with one Parquet folder per split, one vocabulary file per encoded feature and
``manifest.json``, which is written last: a directory without it is an interrupted preparation, never a data set.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from recemb.data.overlap import check_no_overlap

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
# Column of synthetic logs that holds the probability from which a row's label was drawn.
TRUE_PROBABILITY = "true_probability"


@dataclass(frozen=True)
class NumericFeature:
    """One float32 column.

    Args:
        name: column name.
        transform: what the preparation did to the raw value: ``"none"`` or ``"log1p"`` (negatives to 0, then
            log(1 + x)).
    """

    name: str
    transform: str = "none"


@dataclass(frozen=True)
class CategoricalFeature:
    """One column of ids.

    Args:
        name: column name, also the feature's key in the KeyedJaggedTensor.
        num_embeddings: number of ids, in rows of a full table; None for hashed ids in [0, 2**63).
        kind: ``"single"`` (one id a row), ``"list"`` (a bag of ids) or ``"sequence"`` (a list, oldest to newest).
        table: name of the id space; features of one table share ids. A sequence of past items names the table of the
            single feature it is a history of (the target item), which by default has that feature's name.
        vocabulary: path of the vocabulary file relative to the manifest, None where ids were given or hashed.
        min_count: train rows a value needs to get an id of its own.
        out_of_vocabulary: id of every value without one of its own, None where there is none.
        max_length: longest list kept (latest entries), None for single.
        events: for sequences, the list of events they describe: sequences of equal ``events`` are parallel, entry i of
            each (item, its category, its shop) belongs to event i, so in every row they are equally long. Default
            ``"history"``; another name for a second list (purchases beside clicks). Empty for other kinds.
    """

    name: str
    num_embeddings: int | None
    kind: str = "single"
    table: str = ""
    vocabulary: str | None = None
    min_count: int = 1
    out_of_vocabulary: int | None = None
    max_length: int | None = None
    events: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("single", "list", "sequence"):
            raise ValueError(f"feature {self.name!r}: kind must be 'single', 'list' or 'sequence', got {self.kind!r}")
        if self.num_embeddings is not None and self.num_embeddings < 1:
            raise ValueError(f"feature {self.name!r}: num_embeddings must be at least 1, got {self.num_embeddings}")
        if self.events and self.kind != "sequence":
            raise ValueError(f"feature {self.name!r}: events is for sequences, got kind {self.kind!r}")
        if not self.table:
            object.__setattr__(self, "table", self.name)
        if self.kind == "sequence" and not self.events:
            object.__setattr__(self, "events", "history")


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of a split: path relative to the manifest, rows, bytes and XXH3-64 checksum (hex)."""

    path: str
    rows: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Split:
    """The files of one split, in reading order."""

    files: tuple[DataFile, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


@dataclass(frozen=True)
class Manifest:
    """An encoded data set.

    Args:
        root: the directory (not written to the file).
        source: where the log came from: ``"criteo"``, ``"avazu"``, ``"parquet"``, ``"synthetic"``.
        label: name of the 0/1 column.
        numeric, categorical: the features, in the order models see them.
        splits: name to Split; ``train``, ``validation`` (early stopping) and ``test``.
        user: column that groups impressions for GAUC, or None.
        time: column that orders impressions, or None.
        preparation: options of the command that made it, counts of what it met (null values, out-of-vocabulary shares).
        optimum: for synthetic logs: ``{"auc": ..., "logloss": ...}`` of the true probabilities on the test split.
    """

    root: Path
    source: str
    label: str
    numeric: tuple[NumericFeature, ...]
    categorical: tuple[CategoricalFeature, ...]
    splits: Mapping[str, Split]
    user: str | None = None
    time: str | None = None
    preparation: Mapping[str, Any] = field(default_factory=dict)
    optimum: Mapping[str, float] | None = None

    @property
    def feature_names(self) -> list[str]:
        return [feature.name for feature in self.categorical]

    @property
    def numeric_names(self) -> list[str]:
        return [feature.name for feature in self.numeric]

    def split(self, name: str) -> Split:
        """The split called ``name``; ValueError with the names there are."""
        if name not in self.splits:
            raise ValueError(f"{self.root / FILE_NAME}: no split {name!r}; it has {sorted(self.splits)}")
        return self.splits[name]

    def files(self, split: str) -> list[Path]:
        return [self.root / file.path for file in self.split(split).files]

    def train_counts(self, feature: str) -> pa.ChunkedArray:
        """(num_embeddings,) int64 train rows in which each id of ``feature`` occurs, by id.

        For lists, and for a table that several features share: occurrences, over all the table's features.

        Raises:
            ValueError: the feature has no vocabulary file, so nobody counted.
        """
        for candidate in self.categorical:
            if candidate.name == feature and candidate.vocabulary is not None:
                return pq.read_table(self.root / candidate.vocabulary, columns=["train_count"])["train_count"]
        raise ValueError(f"{self.root / FILE_NAME}: feature {feature!r} has no vocabulary, so no train counts")

    def save(self) -> None:
        """Write manifest.json atomically."""
        content = dataclasses.asdict(self)
        del content["root"]
        content = {"schema_version": SCHEMA_VERSION, **content}
        temporary = self.root / f".{FILE_NAME}.{os.getpid()}"
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.root / FILE_NAME)

    @staticmethod
    def load(root: str | Path) -> Manifest:
        """Read ``root/manifest.json``.

        Raises:
            FileNotFoundError: no directory or no manifest in it (a preparation that did not finish).
            ValueError: not JSON, another schema version, or fields missing.
        """
        root = Path(root)
        path = root / FILE_NAME
        if not path.is_file():
            state = (
                "no such directory" if not root.is_dir() else "the directory has none: its preparation did not finish"
            )
            raise FileNotFoundError(
                f"{path}: an encoded data set needs a manifest; {state}. Prepare it with data_pipelines."
            )
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error}); prepare the data set again") from error
        version = content.pop("schema_version", None) if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path}: schema_version must be {SCHEMA_VERSION}, got {version}; "
                "prepare the data set again with this recemb"
            )
        try:
            return Manifest(
                root=root,
                numeric=tuple(NumericFeature(**item) for item in content.pop("numeric")),
                categorical=tuple(CategoricalFeature(**item) for item in content.pop("categorical")),
                splits={
                    name: Split(files=tuple(DataFile(**file) for file in split["files"]))
                    for name, split in content.pop("splits").items()
                },
                **content,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: fields do not match schema version {SCHEMA_VERSION}: {error}") from error

    def verify(self, checksums: bool = False) -> None:
        """Check that the files are those the manifest describes, and that no two splits share rows.

        Every file must be there with the size and rows the manifest says. Shared rows are found where a file is listed
        twice, and where a row group, a file or a split holds exactly the rows of one in another split, in whatever
        order or compression (see recemb.data.overlap for what that leaves out). Reads footers only, and the data of
        pieces that look alike in them.

        Args:
            checksums: also read every byte and compare XXH3-64 sums; about 1 GB a second.

        Raises:
            FileNotFoundError, ValueError: naming the file, what the manifest says and what was found.
        """
        seen: dict[str, str] = {}
        for name, split in self.splits.items():
            for file in split.files:
                # Files without rows are all alike.
                identity = file.checksum if file.rows else file.path
                if other := seen.get(identity):
                    raise ValueError(
                        f"{self.root / file.path}: split {name!r} shares this file's rows with split {other!r}; "
                        "a validation or test row must never be trained on"
                    )
                seen[identity] = name
            self.verify_split(name, checksums)
        check_no_overlap(self)

    def verify_split(self, name: str, checksums: bool = False) -> None:
        """Check the files of one split alone: there, with the size and rows (and checksum) the manifest says."""
        for file in self.split(name).files:
            self._verify_file(file, checksums)

    def _verify_file(self, file: DataFile, checksums: bool) -> None:
        path = self.root / file.path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: listed in {FILE_NAME}, not on disk")
        size = path.stat().st_size
        if size != file.bytes:
            raise ValueError(f"{path}: {file.bytes} bytes in {FILE_NAME}, {size} on disk: truncated or replaced")
        try:
            rows = pq.ParquetFile(path).metadata.num_rows
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
        if rows != file.rows:
            raise ValueError(f"{path}: {file.rows} rows in {FILE_NAME}, {rows} in the file")
        if checksums and (found := checksum(path)) != file.checksum:
            raise ValueError(f"{path}: checksum {file.checksum} in {FILE_NAME}, {found} on disk: the content changed")


def checksum(path: Path) -> str:
    """XXH3-64 of the file's bytes, 16 hex digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_file(root: Path, path: Path) -> DataFile:
    """The DataFile entry of a finished Parquet file below ``root``."""
    return DataFile(
        path=path.relative_to(root).as_posix(),
        rows=pq.ParquetFile(path).metadata.num_rows,
        bytes=path.stat().st_size,
        checksum=checksum(path),
    )
