"""What differs between the versions of SQLAlchemy and of the frameworks that the tests run with."""

from importlib.metadata import version

IS_SQLALCHEMY_2_0 = version("sqlalchemy").startswith("2.0.")
