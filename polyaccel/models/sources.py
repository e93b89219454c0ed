"""Where the usual linears and the embedding come from in a checkpoint."""

from __future__ import annotations

from polyaccel.models.loading import Source
from polyaccel.models.shard import ModelShard
from polyaccel.parallel.cut import Rows


def linear_sources(module: str, site: str, index: int, shape: tuple[int, int], rows: Rows, bias: bool) -> list[Source]:
    """Weight and bias of a linear that is cut by output rows."""
    cols = Rows.whole(shape[1])
    found = [Source(name=f"{module}.weight", shape=shape, site=site, slice=index, rows=rows, cols=cols)]
    if bias:
        found.append(Source(name=f"{module}.bias", shape=shape[:1], site=site, slice=index, rows=rows))
    return found


def row_parallel_sources(
    shard: ModelShard, module: str, site: str, shape: tuple[int, int], cols: Rows, bias: bool
) -> list[Source]:
    """Weight and bias of a linear that is cut by input columns; only rank 0 reads the bias."""
    rows = Rows.whole(shape[0])
    found = [Source(name=f"{module}.weight", shape=shape, site=site, rows=rows, cols=cols)]
    if bias:
        found.append(
            Source(name=f"{module}.bias", shape=shape[:1], site=site, rows=rows if shard.rank == 0 else Rows())
        )
    return found


def embedding_source(shard: ModelShard, name: str, site: str) -> Source:
    """This rank's rows of a tensor ``[vocabulary, hidden]``."""
    config = shard.config
    return Source(
        name=name,
        shape=(config.vocab_size, config.hidden_size),
        site=site,
        rows=shard.vocabulary.rows,
        cols=Rows.whole(config.hidden_size),
    )
