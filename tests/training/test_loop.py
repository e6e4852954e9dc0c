from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recemb.checkpoint import Checkpoints, load_model_tensors, load_state
from recemb.evaluation.predictions import Diverged, collect
from recemb.training.loop import LoopSettings, TrainingLoop
from recemb.training.metrics_log import MetricsLog, read_metrics
from recemb.training.progress import Progress
from recemb.training.schedule import LearningRateSchedule
from recemb.training.stopping import EarlyStopping
from tests.training.small import ListLoader, batches, model_and_optimizer


class Killed(BaseException):
    """What a test raises to end a run at once."""


def make_loop(
    folder: Path,
    *,
    epochs: int = 2,
    count: int = 10,
    optimizer: str = "rowwise_adagrad",
    max_steps: int | None = None,
    validations: list[float] | None = None,
    patience: int | None = None,
    data=None,
    precision: str = "fp32",
    **cadence,
) -> TrainingLoop:
    model, training_optimizer = model_and_optimizer(optimizer)
    loader = ListLoader(data or batches(count))
    held_out = batches(2, seed=1)
    planned = iter(validations or [])

    def validate() -> Mapping[str, float]:
        with torch.no_grad():
            losses = [
                torch.nn.functional.binary_cross_entropy_with_logits(model(batch.dense, batch.sparse), batch.labels)
                for batch in held_out
            ]
        loss = float(torch.stack(losses).mean())
        return {"auc": next(planned) if validations else -loss, "logloss": loss}

    total = min(epochs * len(loader), max_steps or epochs * len(loader))
    return TrainingLoop(
        model,
        training_optimizer,
        loader,
        settings=LoopSettings(total_steps=total, batch_size=16, precision=precision, **cadence),
        schedule=LearningRateSchedule(total_steps=total, warmup_steps=3, decay="linear"),
        stopping=EarlyStopping(patience=patience),
        validate=validate,
        checkpoints=Checkpoints(folder / "checkpoints"),
        device=torch.device("cpu"),
        description={},
    )


def run(loop: TrainingLoop, folder: Path) -> None:
    with MetricsLog(folder, resume_step=loop.step) as log, Progress(1, terminal=False) as progress:
        loop.run(log, progress)


def figures(folder: Path) -> list[dict[str, float]]:
    """What was logged, without what the clock said."""
    return [{key: value for key, value in line.items() if key != "samples_per_second"} for line in read_metrics(folder)]


def state(loop: TrainingLoop) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}


def test_loss_falls_and_every_sample_of_every_epoch_is_counted(tmp_path):
    loop = make_loop(tmp_path, epochs=6, log_every_steps=5)
    run(loop, tmp_path)
    losses = [line["loss"] for line in figures(tmp_path) if line["split"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
    assert (loop.step, loop.samples) == (60, 960)
    assert loop.seconds > 0 and loop.cpu_seconds > 0


def test_logged_losses_are_means_over_the_steps_since_the_last_line(tmp_path):
    one = make_loop(tmp_path / "one", log_every_steps=1)
    four = make_loop(tmp_path / "four", log_every_steps=4)
    for loop, name in ((one, "one"), (four, "four")):
        (tmp_path / name).mkdir(exist_ok=True)
        run(loop, tmp_path / name)
    singles = [line["loss"] for line in figures(tmp_path / "one") if line["split"] == "train"]
    lines = {line["step"]: line["loss"] for line in figures(tmp_path / "four") if line["split"] == "train"}
    assert lines[4] == pytest.approx(math.fsum(singles[:4]) / 4)
    # The end of the epoch is logged too, because its checkpoint starts a new window.
    assert lines[10] == pytest.approx(math.fsum(singles[8:10]) / 2)


def test_validates_at_its_cadence_at_the_end_of_every_epoch_and_at_the_last_step(tmp_path):
    loop = make_loop(tmp_path, count=10, max_steps=17, validate_every_steps=4)
    run(loop, tmp_path)
    assert [line["step"] for line in figures(tmp_path) if line["split"] == "validation"] == [4, 8, 10, 12, 16, 17]


def test_stops_early_and_keeps_the_best(tmp_path):
    loop = make_loop(tmp_path, epochs=9, validations=[0.6, 0.7, 0.65, 0.65, 0.9], patience=2, validate_every_steps=5)
    run(loop, tmp_path)
    assert loop.step == 20
    assert load_state(loop.checkpoints.best)["step"] == 10
    assert load_state(loop.checkpoints.last)["step"] == 20


@pytest.mark.parametrize(("validations", "best"), [([0.9, 0.6, 0.7, 0.8], 0), ([0.5, 0.6, 0.7, 0.65], 10)])
def test_weights_that_were_trained_before_may_stay_the_best(tmp_path, validations, best):
    loop = make_loop(tmp_path, validations=validations, validate_every_steps=5, max_steps=15, validate_start=True)
    start = state(loop)
    run(loop, tmp_path)
    assert [line["step"] for line in figures(tmp_path) if line["split"] == "validation"] == [0, 5, 10, 15]
    assert load_state(loop.checkpoints.best)["step"] == best
    load_model_tensors(loop.checkpoints.best, loop.model)
    assert all(torch.equal(tensor, start[name]) for name, tensor in state(loop).items()) == (best == 0)


def test_killed_before_its_first_step_it_does_not_validate_its_start_again(tmp_path):
    killed = make_loop(tmp_path, validate_start=True)

    def train_step(batch):
        raise Killed

    killed._train_step = train_step
    with pytest.raises(Killed):
        run(killed, tmp_path)
    resumed = make_loop(tmp_path, validate_start=True)
    resumed.resume()
    run(resumed, tmp_path)
    assert [line["step"] for line in figures(tmp_path) if line["split"] == "validation"] == [0, 10, 20]


def test_every_optimizer_follows_the_schedule(tmp_path):
    loop = make_loop(tmp_path, epochs=1, log_every_steps=1)
    seen: list[float] = []
    apply = loop.optimizer.set_learning_rate_factor
    loop.optimizer.set_learning_rate_factor = lambda factor: (seen.append(factor), apply(factor))
    run(loop, tmp_path)
    assert seen == pytest.approx([1 / 3, 2 / 3, 1.0, *(1 - (step + 1) / 7 for step in range(7))])
    logged = [line["learning_rate_factor"] for line in figures(tmp_path) if line["split"] == "train"]
    assert logged == seen


def test_a_factor_of_zero_moves_neither_tables_nor_dense_layers(tmp_path):
    loop = make_loop(tmp_path, epochs=1)
    loop.schedule = LearningRateSchedule(total_steps=10, decay="linear", decay_start_step=0, final_factor=0.0)
    loop.step = 9
    before = state(loop)
    loop._train_step(loop.loader.batches[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(loop).items())


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    killed_after=st.integers(1, 19),
    optimizer=st.sampled_from(["rowwise_adagrad", "adagrad", "sgd", "adam"]),
    checkpoint_every=st.sampled_from([None, 1, 3]),
    validate_every=st.sampled_from([None, 4]),
)
def test_resumed_anywhere_it_ends_exactly_as_if_it_had_not_been_killed(
    tmp_path_factory, killed_after, optimizer, checkpoint_every, validate_every
):
    cadence = {
        "optimizer": optimizer,
        "checkpoint_every_steps": checkpoint_every,
        "validate_every_steps": validate_every,
        "log_every_steps": 2,
    }
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    reference = make_loop(whole, **cadence)
    run(reference, whole)

    killed = make_loop(broken, **cadence)
    step = killed._train_step

    def train_step(batch):
        if killed.step == killed_after:
            raise Killed
        step(batch)

    killed._train_step = train_step
    with pytest.raises(Killed):
        run(killed, broken)
    torch.manual_seed(999)
    resumed = make_loop(broken, **cadence)
    if resumed.checkpoints.last is not None:
        resumed.resume()
    run(resumed, broken)

    assert figures(broken) == figures(whole)
    expected = state(reference)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(resumed).items())
    assert (resumed.samples, resumed.stopping.state_dict()) == (reference.samples, reference.stopping.state_dict())


def test_resuming_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        make_loop(tmp_path).resume()


def test_bf16_trains_with_dense_layers_in_bf16_and_tables_and_weights_in_fp32(tmp_path):
    loop = make_loop(tmp_path, epochs=6, precision="bf16", log_every_steps=5)
    dtypes = {}
    loop.model.head.over.register_forward_hook(lambda module, inputs, output: dtypes.update(dense=output.dtype))
    loop.model.embeddings.register_forward_hook(
        lambda module, inputs, output: dtypes.update(tables=output.values().dtype)
    )
    train_step = loop._train_step
    loop._train_step = lambda batch: (train_step(batch), dtypes.update(step=dict(dtypes)))[0]
    run(loop, tmp_path)
    assert dtypes["step"]["dense"] == torch.bfloat16
    assert dtypes["step"]["tables"] == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in loop.model.parameters())
    losses = [line["loss"] for line in figures(tmp_path) if line["split"] == "train"]
    assert losses[-1] < 0.85 * losses[0]


def test_a_loss_that_is_not_finite_names_step_epoch_and_rows_and_leaves_the_checkpoint_alone(tmp_path):
    data = batches(10)
    loop = make_loop(tmp_path, data=data, checkpoint_every_steps=3)
    train_step = loop._train_step

    def poison(batch):
        if loop.step == 14:
            loop.model.head.over[0].weight.data.fill_(float("nan"))
        train_step(batch)

    loop._train_step = poison
    with pytest.raises(Diverged, match=r"loss is nan in step 14, epoch 1, rows 64 to 79 .*learning_rate"):
        run(loop, tmp_path)
    assert load_state(loop.checkpoints.last)["step"] == 12
    assert all(torch.isfinite(tensor).all() for tensor in loop.model.embeddings.state_dict().values())


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_validation_fails_by_divergence_where_the_last_step_left_a_row_that_is_not_finite(tmp_path, poisoned):
    loop = make_loop(tmp_path, validate_every_steps=3)

    def validate() -> Mapping[str, float]:
        if poisoned:
            loop.model.embeddings.embedding_bags["t_C1"].weight.data[:] = float("inf")
            collect(loop.model, batches(1))
        raise ValueError("logit of its row 4 is inf")

    loop.validate = validate
    said = (
        r"validation after step 3: .* the model has diverged\. Lower optimizer" if poisoned else "^logit of its row 4"
    )
    with pytest.raises(ValueError, match=said) as caught:
        run(loop, tmp_path)
    assert isinstance(caught.value, Diverged) == poisoned


def test_a_number_that_is_not_finite_is_named_with_its_column_and_row(tmp_path):
    data = batches(4)
    data[2].dense[5, 1] = float("inf")
    loop = make_loop(tmp_path, data=data, epochs=1)
    with pytest.raises(
        ValueError, match=r"step 2, epoch 0, rows 32 to 47 .*numeric column 1 of row 37 is inf"
    ) as caught:
        run(loop, tmp_path)
    assert not isinstance(caught.value, Diverged)
