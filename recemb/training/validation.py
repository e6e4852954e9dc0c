"""What the loop looks at on validation rows."""

from __future__ import annotations

from recemb.evaluation import metrics
from recemb.evaluation.grouped import grouped_auc
from recemb.evaluation.predictions import Predictions

# Rows: large enough to keep a GPU busy, small enough that a batch's activations are some ten megabytes.
EVALUATION_BATCH_SIZE = 16_384


def validation_figures(predictions: Predictions, *, user: str | None, stops_by: str) -> dict[str, float]:
    """AUC and log loss, and GAUC where users are known.

    Args:
        predictions: the same rows in the same order on every rank, so the same figures: all decide alike.
        user: column of users, None where there is none.
        stops_by: metric of early stopping, which must be there.

    Raises:
        ValueError: GAUC is asked for where no user has rows of both classes.
    """
    figures = {
        "auc": metrics.auc(predictions.labels, predictions.scores),
        "logloss": metrics.mean(predictions.losses()),
    }
    if user is not None:
        users = grouped_auc(predictions.labels, predictions.scores, predictions.columns[user])
        # Undefined where every user has one class only, which matters to whoever stops by it.
        if users.num_left_out < users.num_groups or stops_by == "gauc":
            figures["gauc"] = users.mean()
    return figures
