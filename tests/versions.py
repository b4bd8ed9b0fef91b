"""What differs between the versions of SQLAlchemy and of the frameworks that the tests run with."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, TypeVar

IS_SQLALCHEMY_2_0 = version("sqlalchemy").startswith("2.0.")

STARLETTE_NAMES_ROUTES = tuple(map(int, version("starlette").split(".")[:2])) >= (1, 7)
"""Whether Starlette says in the scope which route it has found."""

if TYPE_CHECKING:
    from litestar.di import NamedDependency
    from litestar.params import FromQuery
else:
    # Earlier versions of Litestar take the bare types.
    T = TypeVar("T")
    try:
        from litestar.di import NamedDependency
        from litestar.params import FromQuery
    except ImportError:
        NamedDependency = FromQuery = Annotated[T, None]

__all__ = ["FromQuery", "IS_SQLALCHEMY_2_0", "NamedDependency", "STARLETTE_NAMES_ROUTES"]
