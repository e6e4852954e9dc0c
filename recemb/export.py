"""``python -m recemb.export``: a trained run as two files that serve, compared with the run on validation rows.

    python -m recemb.export run=RUN_FOLDER output=FOLDER
    python -m recemb.export run=RUN_FOLDER output=FOLDER data=DIR split=test max_rows=1000000

Every key: ``configs/export.yaml``. Then ``recemb.load("FOLDER")`` in any process.
"""

from __future__ import annotations

import sys
from typing import Any

from recemb import command_line
from recemb.evaluate import spelled_out


def task(config: dict[str, Any]) -> None:
    # Here, because it imports TorchRec: `--help` need not wait for it.
    from recemb.exporting import export

    print(export(config).table())


def main() -> None:
    sys.argv[1:] = spelled_out(sys.argv[1:], short={"data": "data.path"}, paths=("run", "output", "data.path"))
    command_line.run(task, "export")


if __name__ == "__main__":
    main()
