"""Compressed embedding tables for recommender models, on TorchRec and fbgemm.

Importing this package imports neither torch nor TorchRec; it only checks, from package metadata, that the installed
versions of torch, fbgemm and TorchRec work together, and raises ImportError where they do not.
"""

from __future__ import annotations

import sys

from recemb.versions import require_supported_versions

# The doctor explains a wrong combination, so it has to start under one. During `python -m recemb.doctor` the package is
# imported before the module runs, and only the interpreter's own arguments tell.
if "recemb.doctor" not in sys.orig_argv:
    require_supported_versions()
