"""Tables, ids and plain-loop pooling that the embedding tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recemb.budget import fit_to_budget, parse_budget
from recemb.collection import compressed_groups
from recemb.memory import full_table_bytes
from recemb.method import Method, method_class
from recemb.methods.optembed import OptEmbed
from recemb.models.dlrm import DLRM

CONFIGS = Path(__file__).parents[1] / "configs" / "embedding"
BIG = 2**24 + 3


def table(
    name: str,
    num_embeddings: int,
    *,
    dim: int = 8,
    features: Sequence[str] = (),
    pooling: PoolingType = PoolingType.SUM,
) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=f"t_{name}",
        num_embeddings=num_embeddings,
        embedding_dim=dim,
        feature_names=list(features) or [name],
        pooling=pooling,
    )


def small_tables(dim: int = 8) -> list[EmbeddingBagConfig]:
    """Sum and mean pooling, a table that two features share, a table of one row."""
    return [
        table("ad", 4000, dim=dim),
        table("item", 6000, dim=dim, features=["target", "history"], pooling=PoolingType.MEAN),
        table("site", 500, dim=dim),
        table("one", 1, dim=dim),
    ]


def bags(
    keys: Sequence[str], ids: Sequence[Sequence[Sequence[int]]], dtype: torch.dtype = torch.int64
) -> KeyedJaggedTensor:
    """ids[f][b] is the bag of feature f in sample b."""
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.tensor([i for feature in ids for bag in feature for i in bag], dtype=dtype),
        lengths=torch.tensor([len(bag) for feature in ids for bag in feature], dtype=torch.int32),
    )


# Samples with empty, one-element and long bags, repeated ids, ids 0 and n - 1; keys as in small_tables.
KEYS = ["ad", "target", "history", "site", "one"]
MULTI_HOT = [
    [[0, 3999, 7], [], [5]],
    [[5999], [0], [17]],
    [[1, 1, 5999, 4], [], [17]],
    [[], [499, 0], [3]],
    [[0], [0], []],
]
SINGLE = [[[3999], [0], [12]], [[17], [5999], [0]], [[17], [4], [4]], [[499], [0], [250]], [[0], [0], [0]]]


def pool_plainly(
    vectors: dict[str, dict[int, Tensor]], ids: Sequence[Sequence[Sequence[int]]], means: Sequence[bool]
) -> Tensor:
    """Definition: the vector of every id, summed or averaged over its bag, features side by side."""
    rows = []
    for b in range(len(ids[0])):
        columns = []
        for f, key in enumerate(KEYS):
            dim = next(iter(vectors[key].values())).numel()
            total = torch.zeros(dim)
            for value in ids[f][b]:
                total = total + vectors[key][value]
            columns.append(total / len(ids[f][b]) if means[f] and ids[f][b] else total)
        rows.append(torch.cat(columns))
    return torch.stack(rows)


def embedding_configs() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_embedding_config(name: str) -> dict[str, object]:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))  # type: ignore[return-value]


def quarter_sized(name: str) -> Method:
    """The method of a config, at a quarter of the small tables' bytes where it has a size to choose."""
    config = load_embedding_config(name)
    method = instantiate(config["method"])
    if method_class(method).searches:
        # Larger than full tables until its plan is carried out.
        return method
    budget = 1.0 if config["budget"] is None else "4x"
    tables = small_tables()
    return fit_to_budget(tables, method, parse_budget(budget, sum(full_table_bytes(tables).values())))


def without_draws(module: nn.Module) -> nn.Module:
    """In training mode, but for methods that draw at random in it: ranks draw otherwise than one process does."""
    module.train()
    for group in compressed_groups(module):
        if isinstance(group, OptEmbed):
            group.eval()
    return module


def dlrm(embeddings: nn.Module) -> DLRM:
    """A small one of 3 numeric features over tables of width 8."""
    return DLRM(embeddings, num_dense=3, bottom_layers=[16, 8], over_layers=[16, 1])
