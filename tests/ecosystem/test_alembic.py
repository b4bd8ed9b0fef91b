"""The `env.py` of [the page about migrations](how-to/alembic.md) migrates the application's own
`Database`, forth and back.
"""

from tests.test_alembic import (  # noqa: F401
    folder_of_the_page,
    new_folder,
    project,
    test_migrations_are_written_applied_and_taken_back,
)
