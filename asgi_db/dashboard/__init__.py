"""A live page of what the requests do to the database.

app.mount("/db", Dashboard(database, allow=is_operator))
"""

from asgi_db.dashboard.access import Allow
from asgi_db.dashboard.application import Dashboard

__all__ = ["Allow", "Dashboard"]
