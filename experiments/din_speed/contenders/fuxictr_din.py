"""FuxiCTR's DIN, put together from the layers of its wheel as its model zoo does (the zoo is not in the wheel).

Trained by the library's own ``train_epoch`` with its defaults (Adam, gradient clipping) from its .npz loader in RAM.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import Dice, DIN_Attention, FeatureEmbeddingDict, MLP_Block
from fuxictr.pytorch.models import BaseModel
from settings import (
    ATTENTION_LAYERS,
    DENSE_LEARNING_RATE,
    EMBEDDING_DIM,
    HISTORIES,
    LAYERS,
    SINGLE,
    cardinalities,
    history_length,
    padded,
)

from protocol import EpochClock, parse_options, report  # isort: skip


class DIN(BaseModel):
    """The zoo's DIN with parallel sequences attended jointly and Dice."""

    def __init__(self, feature_map: FeatureMap, scratch: Path) -> None:
        super().__init__(feature_map, metrics=["AUC"], verbose=0, model_root=str(scratch))
        self.embedding_layer = FeatureEmbeddingDict(feature_map, EMBEDDING_DIM)
        self.attention = DIN_Attention(
            EMBEDDING_DIM * len(HISTORIES), attention_units=ATTENTION_LAYERS, hidden_activations="Dice"
        )
        self.dnn = MLP_Block(
            EMBEDDING_DIM * (len(SINGLE) + len(HISTORIES)),
            output_dim=1,
            hidden_units=LAYERS,
            hidden_activations=[Dice(units) for units in LAYERS],
            output_activation=self.output_activation,
        )
        self.compile("adam", "binary_crossentropy", DENSE_LEARNING_RATE)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch = self.get_inputs(inputs)
        vectors = self.embedding_layer(batch)
        target = torch.cat([vectors[name] for name in HISTORIES.values()], dim=-1)
        history = torch.cat([vectors[name] for name in HISTORIES], dim=-1)
        mask = batch["item_history"].long() != 0
        pooled = self.attention(target, history, mask)
        return {"y_pred": self.dnn(torch.cat([pooled, *(vectors[name] for name in SINGLE)], dim=-1))}


def feature_map(data: Path, scratch: Path, longest: int) -> FeatureMap:
    result, rows = FeatureMap("din_speed", str(scratch)), cardinalities(data)
    result.features = OrderedDict(
        (name, {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": rows[name]}) for name in SINGLE
    )
    for name, target in HISTORIES.items():
        result.features[name] = {
            "source": "",
            "type": "sequence",
            "feature_encoder": None,
            "share_embedding": target,
            "padding_idx": 0,
            "vocab_size": rows[target],
            "max_len": longest,
        }
    result.labels = ["label"]
    result.num_fields = len(result.features)
    result.default_emb_dim = EMBEDDING_DIM
    result.set_column_index()
    return result


def main() -> None:
    options = parse_options("fp32")
    longest = history_length(options.data)
    features = feature_map(options.data, options.scratch, longest)
    paths, truth = {}, {}
    for split in ("train", "validation"):
        columns = padded(options.data, split, longest)
        truth[split] = columns["label"]
        paths[split] = str(options.scratch / f"{options.data.name}-{split}.npz")
        np.savez(paths[split], **columns)
    train, validation = RankDataLoader(
        features,
        stage="train",
        train_data=paths["train"],
        valid_data=paths["validation"],
        batch_size=options.batch_size,
        shuffle=True,
        data_format="npz",
        num_workers=0,
    )
    model = DIN(features, options.scratch)
    # What fit() sets before its epochs; fit() itself would evaluate and write checkpoints inside the epoch.
    model._max_gradient_norm, model._eval_steps, model._total_steps = 10.0, 10**9, 0
    model._stop_training, model._epoch_index = False, 0
    clock = EpochClock()
    for _ in range(options.epochs):
        clock.start()
        model.train_epoch(train)
        clock.stop(train.num_samples)
    report(options, clock, truth["validation"], model.predict(validation))


if __name__ == "__main__":
    main()
