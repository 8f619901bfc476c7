"""Features as a file for other programs: Parquet, or NPZ without Python objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lit_transfer.features.table import FeatureTable
from lit_transfer.files import replacing

ROWS_PER_GROUP = 4096


def write_features(
    folder: Path,
    form: Literal["parquet", "npz"],
    streams: Mapping[str, FeatureTable],
    label: str | None,
    blocks: Sequence[Mapping[str, Any]],
) -> Path:
    """Write `features.parquet` or `features.npz`, whole or not at all, and return its path.

    A row a sample: `key`, `split` (the name of its stream), `features` (fp32), and its label: `label`, the name of its
    class, or of a multilabel dataset a column `label.NAME` for each label (0, 1, or missing). In an .npz the latter are
    `labels` [N, L], NaN where missing, whose names are `classes`.

    Args:
        folder: of the file.
        form: of the file.
        streams: by name.
        label: the label column, where it was chosen among several.
        blocks: what stands where in a vector; kept as JSON, in Parquet in the metadata of the schema.
    """
    path = folder / f"features.{form}"
    write = _write_parquet if form == "parquet" else _write_npz
    with replacing(path) as temporary:
        write(temporary, streams, label, json.dumps(list(blocks)))
    return path


def _write_parquet(path: Path, streams: Mapping[str, FeatureTable], label: str | None, blocks: str) -> None:
    tables = [_table(name, features, label) for name, features in streams.items()]
    schema = tables[0].schema.with_metadata({"blocks": blocks})
    with pq.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata), ROWS_PER_GROUP)


def _table(name: str, features: FeatureTable, label: str | None) -> pa.Table:
    values = features.values.numpy()
    labels = _labels(features, label)
    if labels.ndim == 1:
        columns = {"label": pa.array(labels.tolist(), pa.string())}
    else:
        names = features.samples.manifest.classes(label)
        columns = {
            f"label.{n}": pa.array(c, pa.float32(), from_pandas=True) for n, c in zip(names, labels.T, strict=True)
        }
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.table({"key": _keys(features), "split": [name] * len(values), **columns, "features": vectors})


def _write_npz(path: Path, streams: Mapping[str, FeatureTable], label: str | None, blocks: str) -> None:
    first = next(iter(streams.values()))
    np.savez(
        path,
        key=np.concatenate([np.array(_keys(one).to_pylist()) for one in streams.values()]),
        split=np.concatenate([np.full(len(one.rows), name) for name, one in streams.items()]),
        labels=np.concatenate([_labels(one, label) for one in streams.values()]),
        features=np.concatenate([one.values.numpy() for one in streams.values()]),
        classes=np.array(first.samples.manifest.classes(label)),
        blocks=np.array(blocks),
    )


def _keys(features: FeatureTable) -> pa.ChunkedArray:
    return features.samples.manifest.table["key"].take(features.rows)


def _labels(features: FeatureTable, label: str | None) -> NDArray[Any]:
    """Names of classes [N], or of a multilabel dataset fp32 [N, L]."""
    targets = features.samples.targets[features.rows]
    return targets if targets.ndim == 2 else np.array(features.samples.manifest.classes(label))[targets]
