"""From raw pairs to a clean, deduplicated and balanced set of pairs, as Parquet shards.

A *batch* is a `dict[str, list]`, a column of values by name (`koclip.curation.batch`). A *step* is a pure function of a
batch. It returns the batch with a reason in the column `reason` for each row that it drops ("" keeps the row), and
never changes the order or the number of rows. There are two kinds of steps:

- a local step looks at a row alone: captions, pictures, pair scores. `pipeline.LOCAL` lists them.
- a global step compares rows: repeated captions, overlap with evaluation sets, near-duplicates, the threshold of pair
  scores, balance. It has three functions: `collect` takes the facts from a batch, `decide` makes a decision from the
  facts of all batches, `apply` is a pure function of a batch and the decision. `pipeline.GLOBAL` lists them.

The pipeline divides the sources into *units*: fixed ranges of rows, or the files of a stream. It has three stages:

1. The local steps check every unit. Each unit becomes a table without pictures.
2. The global steps run over these tables, one step after the other. A step does not see the rows that an earlier step
   dropped.
3. Each unit is read again, and its kept rows become a shard.

An *engine* maps a function over units (`koclip.curation.engines`); stages 1 and 3 use it. Units do not depend on the
number of workers, so equal configurations give equal bytes. The name of a shard contains a hash of the rows and
captions that it holds. An interrupted run finds its tables and shards by their names, and continues. The directory of
the result appears when it is complete.
"""

from koclip import installation

installation.require("curate")
