"""Which data set a study is of: enough to tell it from another, and nothing of the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import xxhash

from recemb.data.manifest import Manifest
from recemb.training.results import data_figures


def describe(manifest: Manifest) -> dict[str, Any]:
    """``data_figures`` and a checksum: XXH3-64 (hex) of the features and of the checksums of all files."""
    content = {
        "label": manifest.label,
        "user": manifest.user,
        "numeric": [asdict(feature) for feature in manifest.numeric],
        "categorical": [asdict(feature) for feature in manifest.categorical],
        "files": {name: [file.checksum for file in split.files] for name, split in manifest.splits.items()},
    }
    return {
        **data_figures(manifest),
        "checksum": xxhash.xxh3_64(json.dumps(content, sort_keys=True).encode()).hexdigest(),
    }


def in_words(data: Mapping[str, Any]) -> str:
    """Source and rows, for people."""
    return f"{data['source']} ({', '.join(f'{rows:,} {name}' for name, rows in data['rows'].items())} rows)"
