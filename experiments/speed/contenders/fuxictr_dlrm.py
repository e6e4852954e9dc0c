"""FuxiCTR's DLRM, put together from the layers of its wheel (its model zoo is not in the wheel).

Trained by the library's own ``train_epoch`` with its defaults (Adam, gradient clipping) from its .npz loader in RAM,
the faster of its two loaders (the Parquet one starts Ray). Its loader gives float64; as in its zoo's DeepFM, inputs are
cast where they enter the network.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FeatureEmbedding, InnerProductInteraction, MLP_Block
from fuxictr.pytorch.models import BaseModel
from protocol import (
    BOTTOM_LAYERS,
    CATEGORICAL,
    DENSE_LEARNING_RATE,
    EMBEDDING_DIM,
    NUMERIC,
    OVER_LAYERS,
    EpochClock,
    cardinalities,
    column,
    labels,
    parquet_file,
    parse_options,
    report,
)


class DLRM(BaseModel):
    """The zoo's DLRM with dot interaction: bottom MLP, inner products of all pairs, top MLP."""

    def __init__(self, feature_map: FeatureMap, scratch: Path) -> None:
        super().__init__(feature_map, metrics=["AUC"], verbose=0, model_root=str(scratch))
        self.embedding_layer = FeatureEmbedding(
            feature_map, EMBEDDING_DIM, required_feature_columns=CATEGORICAL, not_required_feature_columns=NUMERIC
        )
        self.bottom = MLP_Block(len(NUMERIC), BOTTOM_LAYERS[:-1], output_dim=BOTTOM_LAYERS[-1])
        self.interaction = InnerProductInteraction(len(CATEGORICAL) + 1, output="inner_product")
        self.top = MLP_Block(
            self.interaction.interaction_units + EMBEDDING_DIM,
            OVER_LAYERS[:-1],
            output_dim=1,
            output_activation=self.output_activation,
        )
        self.compile("adam", "binary_crossentropy", DENSE_LEARNING_RATE)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        features = self.get_inputs(inputs)
        numeric = self.bottom(torch.stack([features[name] for name in NUMERIC], dim=1).float())
        vectors = torch.cat([self.embedding_layer(features), numeric.unsqueeze(1)], dim=1)
        return {"y_pred": self.top(torch.cat([self.interaction(vectors), numeric], dim=1))}


def feature_map(data: Path, scratch: Path) -> FeatureMap:
    result = FeatureMap("speed", str(scratch))
    result.features = OrderedDict((name, {"source": "", "type": "numeric"}) for name in NUMERIC)
    for name, rows in zip(CATEGORICAL, cardinalities(data), strict=True):
        result.features[name] = {"source": "", "type": "categorical", "vocab_size": rows}
    result.labels = ["label"]
    result.num_fields = len(result.features)
    result.default_emb_dim = EMBEDDING_DIM
    result.set_column_index()
    return result


def write_npz(data: Path, split: str, scratch: Path) -> str:
    path = scratch / f"{split}.npz"
    if not path.exists():
        file = pq.ParquetFile(parquet_file(data, split))
        columns = {n: column(file.read(columns=[n], use_threads=False), n) for n in [*NUMERIC, *CATEGORICAL, "label"]}
        np.savez(path, **columns)
    return str(path)


def main() -> None:
    options = parse_options("fp32")
    features = feature_map(options.data, options.scratch)
    paths = {split: write_npz(options.data, split, options.scratch) for split in ("train", "validation")}
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
    model = DLRM(features, options.scratch)
    # What fit() sets before its epochs; fit() itself would evaluate and write checkpoints inside the epoch.
    model._max_gradient_norm, model._eval_steps, model._total_steps = 10.0, 10**9, 0
    model._stop_training, model._epoch_index = False, 0
    clock = EpochClock()
    for epoch in range(options.epochs):
        clock.start()
        model.train_epoch(train)
        clock.stop(train.num_samples)
        if epoch == 0:
            scores = model.predict(validation)
    report(options, clock, labels(options.data, "validation"), scores)


if __name__ == "__main__":
    main()
