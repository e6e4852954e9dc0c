"""Compressed embedding tables for recommender models, on TorchRec and fbgemm.

Importing this package imports neither torch nor TorchRec; it only checks, from package metadata, that the installed
versions of torch, fbgemm and TorchRec work together, and raises ImportError where they do not.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from recemb.versions import require_supported_versions

# The doctor explains a wrong combination, so it has to start under one. During `python -m recemb.doctor` the package is
# imported before the module runs, and only the interpreter's own arguments tell.
if "recemb.doctor" not in sys.orig_argv:
    require_supported_versions()

if TYPE_CHECKING:
    from recemb.budget import fit_to_budget as fit_to_budget
    from recemb.budget import parse_budget as parse_budget
    from recemb.collection import CompressedEmbeddingBagCollection as CompressedEmbeddingBagCollection
    from recemb.collection import CompressedEmbeddingCollection as CompressedEmbeddingCollection
    from recemb.compression import compress_ as compress_
    from recemb.conversion import convert as convert
    from recemb.initial_rows import unfilled_tables as unfilled_tables
    from recemb.memory import MemoryReport as MemoryReport
    from recemb.memory import estimate_memory as estimate_memory
    from recemb.memory import measure_memory as measure_memory
    from recemb.method import UNBOUNDED as UNBOUNDED
    from recemb.method import CompressedTables as CompressedTables
    from recemb.optimizers import EmbeddingOptimizer as EmbeddingOptimizer
    from recemb.preparation import prepare as prepare
    from recemb.saved_model import load as load
    from recemb.saved_model import save as save

# Public name -> where it lives; loaded on first use, because torch and TorchRec take seconds to import.
_HOMES = {
    "CompressedEmbeddingBagCollection": "recemb.collection",
    "CompressedEmbeddingCollection": "recemb.collection",
    "CompressedTables": "recemb.method",
    "EmbeddingOptimizer": "recemb.optimizers",
    "MemoryReport": "recemb.memory",
    "UNBOUNDED": "recemb.method",
    "compress_": "recemb.compression",
    "convert": "recemb.conversion",
    "estimate_memory": "recemb.memory",
    "fit_to_budget": "recemb.budget",
    "load": "recemb.saved_model",
    "measure_memory": "recemb.memory",
    "parse_budget": "recemb.budget",
    "prepare": "recemb.preparation",
    "save": "recemb.saved_model",
    "unfilled_tables": "recemb.initial_rows",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'recemb' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
