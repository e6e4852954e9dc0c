"""From the form that trains to the form that serves."""

from __future__ import annotations

from torch import nn
from torchrec.distributed.types import ShardedModule

from recemb.method import CompressedTables


def convert(model: nn.Module) -> nn.Module:
    """Replace every group of compressed tables inside ``model`` by the form that serves, in place.

    Pruned tables become packed ones with the same vectors bit for bit; methods that serve as they train stay what they
    are. Keep a copy (``copy.deepcopy``) where the training form is needed still.

    Args:
        model: holds recemb's collections, before or after ``recemb.prepare``, not sharded over ranks; or is one.

    Returns:
        ``model``, or what takes its place where it is a method's tables itself.

    Raises:
        ValueError: tables are sharded: load the checkpoint in one process (``recemb.run_folder.load_model``).

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from torchrec import EmbeddingBagConfig
        >>> from recemb.collection import CompressedEmbeddingBagCollection
        >>> from recemb.methods.pruned import Pruned
        >>> from recemb.plan import CompressionPlan, TablePlan
        >>> tables = [EmbeddingBagConfig(name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"])]
        >>> plan = CompressionPlan({"t": TablePlan(100, 8, kept_rows=torch.arange(100) < 10)}, source="by hand")
        >>> model = CompressedEmbeddingBagCollection(tables, partial(Pruned, plan=plan))
        >>> convert(model).groups[0]
        PackedTables()
    """
    if sharded := [path for path, module in model.named_modules() if isinstance(module, ShardedModule)]:
        raise ValueError(
            f"tables must lie in one process, {sharded[0]!r} is sharded over ranks: load the run's checkpoint with "
            "recemb.run_folder.load_model and convert that"
        )
    groups: dict[str, CompressedTables] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}." if outer else "") for outer in groups)
        if isinstance(module, CompressedTables) and not inside:
            groups[path] = module
    for path, group in groups.items():
        served = group.convert()
        if served is group:
            continue
        served.train(group.training).to(next(iter([*group.parameters(), *group.buffers()])).device)
        if not path:
            return served
        parent, _, name = path.rpartition(".")
        # A ModuleList keeps its entries under their numbers.
        setattr(model.get_submodule(parent), name, served)
    return model
