"""Columns by name: dots reach into nested records, in the features of a table and in its records alike."""

from collections.abc import Iterator, Mapping
from typing import Any

import datasets

LISTS = (datasets.List, datasets.LargeList)


def dig(record: Any, column: str) -> Any:
    """Return a column of a record, None if it has none; dots reach into nested records and lists of records."""
    if isinstance(record, (list, tuple)):
        return [dig(one, column) for one in record]
    if not isinstance(record, Mapping):
        return None
    if column in record:
        return record[column]
    top = top_column(record, column)
    return None if top == column else dig(record[top], column[len(top) + 1 :])


def top_column(record: Mapping[str, Any], column: str) -> str:
    """Return the part of a dotted column name that is a key of `record`: columns may have dots in their names."""
    parts = column.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in record), column)


def has_column(feature: Any, column: str) -> bool:
    """Tell whether a table with these features, or such a record, has a column; JSON may hold anything."""
    if isinstance(feature, LISTS):
        return has_column(feature.feature, column)
    if isinstance(feature, list):
        return any(has_column(item, column) for item in feature)
    if not isinstance(feature, Mapping):
        return isinstance(feature, datasets.Json)
    top = top_column(feature, column)
    return top in feature and (top == column or has_column(feature[top], column[len(top) + 1 :]))


def column_names(feature: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the columns in these features, or in such a record."""
    if isinstance(feature, LISTS):
        yield from column_names(feature.feature, prefix)
    elif isinstance(feature, list) and feature and isinstance(feature[0], Mapping):
        yield from column_names(feature[0], prefix)
    elif isinstance(feature, Mapping):
        for name, inner in feature.items():
            yield from column_names(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix
