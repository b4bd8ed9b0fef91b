"""The admin panel on the engine and the sessions of a `Database`: rows are made, changed, listed
and deleted, and a refused COMMIT is shown as an error.
"""

from starlette.applications import Starlette
from starlette_admin.contrib.sqla import Admin, ModelView

from asgi_db import Database, DBSessionMiddleware
from tests.ecosystem.heroes import Hero, Team, heroes, serving
