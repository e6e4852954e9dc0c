"""The names of ``import recemb``: all there, loaded lazily."""

from __future__ import annotations

import subprocess
import sys

import recemb


def test_every_public_name_resolves_to_its_own_definition() -> None:
    for name in recemb.__all__:
        value = getattr(recemb, name)
        assert getattr(value, "__name__", name) == name


def test_importing_recemb_imports_neither_torch_nor_torchrec() -> None:
    code = "import recemb, sys; assert not {'torch', 'torchrec', 'fbgemm_gpu'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
