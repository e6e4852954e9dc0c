"""Draw what a trained DIN attends to in the histories of a few MovieLens users.

    python -m recemb.train +experiment=movielens_din data.path=data/din/movielens trainer.epochs=1 hydra.run.dir=RUN
    python experiments/din/attention.py RUN ml-1m_movies.parquet

The first rows of the test split whose histories have 8 to 16 events, one a user.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as pq

from recemb.data.manifest import Manifest
from recemb.data.parquet import ParquetLoader
from recemb.evaluation.attention_plot import attended_histories, attention_plot, value_names
from recemb.models.din import DIN
from recemb.run_folder import load_model

SHORTEST, LONGEST = 8, 16
USERS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run", type=Path, help="folder of the training")
    parser.add_argument("movies", type=Path, help="Parquet with item_id and title")
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    arguments = parser.parse_args()
    model, config = load_model(arguments.run)
    assert isinstance(model, DIN) and config.data.path is not None
    manifest = Manifest.load(config.data.path)
    assert manifest.user is not None
    batch = next(iter(ParquetLoader(manifest, "test", batch_size=4096, extra_columns=[manifest.user])))
    names = value_names(manifest)
    movies = pq.read_table(arguments.movies, columns=["item_id", "title"]).to_pydict()
    titles = {str(item): title for item, title in zip(movies["item_id"], movies["title"], strict=True)}
    names["movie"] = [titles.get(name, name) for name in names["movie"]]
    lengths = batch.sparse["movie_history"].lengths().tolist()
    users: dict[object, int] = {}
    for row, length in enumerate(lengths):
        if SHORTEST <= length <= LONGEST:
            users.setdefault(batch.extra[manifest.user][row], row)
    rows = list(users.values())[:USERS]
    attention_plot(
        attended_histories(model, batch, rows, names=names),
        arguments.out,
        title="What DIN attends to: weights of movies rated 4 or 5 before, newest at the top",
    )


if __name__ == "__main__":
    main()
