"""DeepCTR-Torch's DIN, trained from numpy arrays in RAM, as its documentation does.

In its favour: no L2 penalty (its default adds the norm of all tables to every step), ``verbose=0`` (otherwise it
computes metrics on every batch), padded arrays made before the clock starts.
"""

from __future__ import annotations

import requests
from settings import ATTENTION_LAYERS, EMBEDDING_DIM, HISTORIES, LAYERS, SINGLE, cardinalities, history_length, padded

from protocol import EpochClock, parse_options, report  # isort: skip


def _offline(*_: object, **__: object) -> None:
    raise ConnectionError("the benchmark runs offline")


# The library asks a package registry for its newest version when it is imported.
requests.get = _offline

from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat  # noqa: E402
from deepctr_torch.models import DIN  # noqa: E402


def main() -> None:
    options = parse_options("fp32")
    rows, longest = cardinalities(options.data), history_length(options.data)
    columns = [SparseFeat(name, rows[name], embedding_dim=EMBEDDING_DIM) for name in SINGLE]
    columns += [
        VarLenSparseFeat(
            SparseFeat(f"hist_{target}", rows[target], embedding_dim=EMBEDDING_DIM, embedding_name=target),
            maxlen=longest,
            length_name="history_length",
        )
        for target in HISTORIES.values()
    ]
    arrays = {split: padded(options.data, split, longest) for split in ("train", "validation")}
    inputs = {
        split: {HISTORIES.get(name, name): values for name, values in content.items() if name not in HISTORIES}
        | {f"hist_{target}": content[name] for name, target in HISTORIES.items()}
        for split, content in arrays.items()
    }
    truth = {split: content.pop("label") for split, content in inputs.items()}
    model = DIN(
        columns,
        list(HISTORIES.values()),
        dnn_hidden_units=LAYERS,
        # Its Dice of the dense part asserts three dimensions and gets two.
        dnn_activation="prelu",
        att_hidden_size=ATTENTION_LAYERS,
        att_activation="dice",
        l2_reg_embedding=0,
        seed=options.seed,
        device="cpu",
    )
    model.compile("adam", "binary_crossentropy")
    clock = EpochClock()
    for _ in range(options.epochs):
        clock.start()
        model.fit(inputs["train"], truth["train"], batch_size=options.batch_size, epochs=1, verbose=0)
        clock.stop(len(truth["train"]))
    report(options, clock, truth["validation"], model.predict(inputs["validation"], options.batch_size)[:, 0])


if __name__ == "__main__":
    main()
