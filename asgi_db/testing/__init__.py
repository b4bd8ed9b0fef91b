"""For tests of applications: sandboxes, and databases that last as long as a test run."""

from __future__ import annotations

from asgi_db.testing.captured import CapturedStatements
from asgi_db.testing.databases import temporary_database, test_database_url
from asgi_db.testing.sandbox import Sandbox

__all__ = ["CapturedStatements", "Sandbox", "temporary_database", "test_database_url"]
