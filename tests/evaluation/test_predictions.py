"""Predictions from models, and from and to Parquet files."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recemb.evaluation.predictions import Diverged, Predictions, collect, read_predictions, write_predictions


@dataclass(frozen=True)
class FakeBatch:
    dense: torch.Tensor
    sparse: None
    labels: torch.Tensor
    extra: dict = field(default_factory=dict)

    def to(self, device):
        return self


def batches(sizes, seed=0):
    generator = np.random.default_rng(seed)
    made = []
    for size in sizes:
        users = generator.integers(0, 5, size)
        sites = np.array([f"s{user}" for user in users], dtype=object)
        labels = torch.from_numpy(generator.integers(0, 2, size).astype(np.float32))
        made.append(
            FakeBatch(torch.from_numpy(generator.normal(size=(size, 3))).float(), None, labels, {"user": users})
        )
        made[-1].extra["site"] = sites
    return made


class Sum(torch.nn.Module):
    """Logit = sum of the dense features; remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.modes = []

    def forward(self, dense, sparse):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return dense @ self.weight


def test_collect_keeps_every_row_in_order_with_its_columns():
    parts = batches([4, 4, 1])
    predictions = collect(Sum(), parts)
    expected = torch.cat([part.dense.sum(dim=1) for part in parts])
    np.testing.assert_allclose(predictions.scores, expected.numpy(), rtol=1e-6)
    assert predictions.are_logits and predictions.scores.dtype == np.float32
    assert predictions.labels.tolist() == torch.cat([part.labels for part in parts]).bool().tolist()
    assert predictions.column("user").tolist() == [user for part in parts for user in part.extra["user"]]
    assert predictions.column("site").tolist() == [site for part in parts for site in part.extra["site"]]


@pytest.mark.parametrize("training", [True, False])
def test_collect_runs_without_dropout_or_gradients_and_restores_the_mode(training):
    model = Sum().train(training)
    seen = []
    collect(model, batches([2, 3]), on_batch=seen.append)
    assert model.modes == [(False, False)] * 2
    assert model.training is training
    assert seen == [2, 3]


def test_a_nan_logit_is_an_error_that_names_batch_and_row_and_restores_the_mode():
    parts = batches([4, 4])
    parts[1].dense[2, 0] = float("nan")
    model = Sum().train()
    named = r"batch 1: logit of its row 2 \(row 6 of the split on this rank\) is nan; 1 of 4 logits are NaN or inf: "
    with pytest.raises(ValueError, match=named + "so is a numeric column of the batch") as caught:
        collect(model, parts)
    assert model.training and not isinstance(caught.value, Diverged)
    # Finite weights may overflow too.
    parts[1].dense[2, 0] = 3e38
    with pytest.raises(Diverged, match=r"row 2 .* is inf; 1 of 4 logits are NaN or inf: the model has diverged"):
        collect(lambda dense, sparse: 10 * dense.sum(dim=1), parts)


def test_logits_of_another_shape_and_no_rows_are_errors():
    with pytest.raises(ValueError, match=r"batch 0: one logit a row, shape \(4,\), is required, got \(4, 1\)"):
        collect(lambda dense, sparse: dense[:, :1], batches([4]))
    with pytest.raises(ValueError, match="at least one row is required, the loader gave none"):
        collect(Sum(), [])


def test_half_precision_logits_are_kept_as_float32():
    predictions = collect(lambda dense, sparse: dense.sum(dim=1).bfloat16(), batches([4]))
    assert predictions.scores.dtype == np.float32


def make_predictions():
    generator = np.random.default_rng(1)
    return Predictions(
        labels=generator.random(100) < 0.4,
        scores=generator.normal(size=100).astype(np.float32) * 10,
        are_logits=True,
        columns={"user": generator.integers(0, 9, 100), "site": np.array(["a", "b"] * 50, dtype=object)},
    )


def test_written_predictions_read_back_as_logits_and_as_probabilities(tmp_path):
    predictions = make_predictions()
    path = tmp_path / "predictions.parquet"
    write_predictions(predictions, path, label="click")
    logits = read_predictions(path, label="click", score="logit", are_logits=True, columns=["user", "site"])
    assert np.array_equal(logits.labels, predictions.labels) and np.array_equal(logits.scores, predictions.scores)
    for name, values in predictions.columns.items():
        assert np.array_equal(logits.column(name), values)
    probabilities = read_predictions(path, label="click", score="probability")
    assert np.array_equal(probabilities.probabilities(), predictions.probabilities())
    assert [entry.name for entry in tmp_path.iterdir()] == ["predictions.parquet"]


def test_a_column_that_would_be_written_twice_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"columns \['user'\] would be written twice"):
        write_predictions(make_predictions(), tmp_path / "p.parquet", label="user")
    assert not list(tmp_path.iterdir())


def test_dictionary_columns_and_integers_with_nulls_keep_their_values(tmp_path):
    path = tmp_path / "p.parquet"
    large = 2**53 + 1
    table = {"y": [0, 1, 1], "p": [0.1, 0.5, 0.9], "i": [large, None, large - 1]}
    pq.write_table(pa.table({**table, "s": pa.array(["x", "y", "x"]).dictionary_encode()}), path)
    predictions = read_predictions(path, label="y", score="p", columns=["i", "s"])
    assert predictions.column("i").tolist() == [large, None, large - 1]
    assert predictions.column("s").tolist() == ["x", "y", "x"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"y": [0, 1, 1, 0]}, r"no column 'p'; the file has \['y'\]"),
        (
            {"y": [0, 1, 1, None], "p": [0.1] * 4},
            r"row group 1, column 'y', row 1: a value is required, got null \(1 of 4",
        ),
        ({"y": [0, 1, 1, 0], "p": [0.1, 0.2, None, 0.1]}, r"row group 1, column 'p', row 0: a value is required"),
        ({"y": ["no", "yes", "no", "no"], "p": [0.1] * 4}, r"column 'y': numbers required, got string"),
        ({"y": [0, 1, 1, 0], "p": [[0.1]] * 4}, r"column 'p': numbers required, got list"),
        ({"y": [0, 5, 1, 0], "p": [0.1] * 4}, r"columns 'y' \(labels\) and 'p' \(scores\): labels: .* got 5 in row 1"),
        ({"y": [0, 1, 1, 0], "p": [0.1, 0.2, 0.3, float("nan")]}, r"must be finite, got nan in row 3"),
        ({"y": [0, 1, 1, 0], "p": [0.1, -3.0, 0.3, 4.0]}, r"got -3.0 in row 1 .* pass them as logits"),
    ],
)
def test_bad_files_are_errors_that_say_where(tmp_path, columns, message):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=2)
    with pytest.raises(ValueError, match=message) as error:
        read_predictions(path, label="y", score="p")
    assert str(path) in str(error.value)


def test_missing_truncated_and_foreign_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_predictions(tmp_path / "none.parquet", label="y", score="p")
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"y": [0, 1], "p": [0.1, 0.2]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_predictions(path, label="y", score="p")


def test_columns_must_fit():
    with pytest.raises(ValueError, match="column 'user': 2 rows are required, got 3"):
        Predictions(np.array([True, False]), np.array([0.1, 0.2]), True, {"user": np.arange(3)})
    with pytest.raises(ValueError, match=r"no column 'site' among the predictions; they have \['user'\]"):
        Predictions(np.array([True, False]), np.array([0.1, 0.2]), True, {"user": np.arange(2)}).column("site")
