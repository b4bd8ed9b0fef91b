"""The tables that `asgi-db create-tables` and `drop-tables` are told of."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from sqlalchemy import Connection, MetaData, Table, inspect

from asgi_db.errors import ConfigurationError

FORM = "Write module:Base, or module:metadata."


def load_metadata(place: str) -> MetaData:
    """Import the tables that `module:attribute` names, from the working directory too.

    The attribute is a `MetaData`, or something with `.metadata`, such as a declarative base.

    Raises:
        ConfigurationError: there is no such module, attribute or table; the message says which.
    """
    name, colon, attributes = place.partition(":")
    if not (name and colon and attributes):
        raise ConfigurationError(f"{place!r} does not say where the tables are. {FORM}")
    found: Any = _import(name)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise ConfigurationError(f"{place}: there is no {attribute!r} in it. {FORM}")
        found = getattr(found, attribute)
    metadata = found if isinstance(found, MetaData) else getattr(found, "metadata", None)
    if not isinstance(metadata, MetaData):
        raise ConfigurationError(
            f"{place} is neither a MetaData nor a declarative base, but {type(found).__name__}."
            f" {FORM}"
        )
    if not metadata.tables:
        raise ConfigurationError(
            f"{place} has no tables: name the module that defines them, or one that imports it."
        )
    return metadata


def _import(name: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:  # the console script has its own folder there instead
        sys.path.insert(0, folder)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing == name or name.startswith(f"{missing}."):
            raise ConfigurationError(
                f"There is no module {missing!r} in {folder} or among what is installed."
            ) from None
        raise


def existing(connection: Connection, metadata: MetaData) -> list[Table]:
    """Return those of the tables that the database has, in the order of their dependencies."""
    inspector = inspect(connection)
    return [
        table
        for table in metadata.sorted_tables
        if inspector.has_table(table.name, schema=table.schema)
    ]
