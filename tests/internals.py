"""What the tests use of the library that users do not import.

The only file of the tests that knows in which modules these names stand; `limits.py` is the same
for the limits of time. (`test_cli.py` also runs a program which cannot import the tests.)
"""

from asgi_db.asgi.call import session_key
from asgi_db.asgi.retry import BODY_LIMIT
from asgi_db.cli.capacity import FEW, Queue, pools_of_servers, smallest_pool
from asgi_db.cli.check import PINGS
from asgi_db.cli.commands import cli
from asgi_db.cli.sqlite import file_system
from asgi_db.dashboard.chart import steps, top_of
from asgi_db.dashboard.markup import Markup, duration, percent, rate, seconds, tag
from asgi_db.dashboard.recorder import (
    HISTORY,
    KINDS,
    MOST_SHOWN,
    MOST_UNITS,
    Recorder,
    UnitOfInterest,
)
from asgi_db.dashboard.routes import MOST_ROWS
from asgi_db.dashboard.view import View
from asgi_db.drivers import driver_of, driver_of_url, register
from asgi_db.drivers.base import AnyDriver
from asgi_db.drivers.connecting import background_is_over
from asgi_db.drivers.protocol import BEGIN_OPTION, Beginning
from asgi_db.drivers.sqlite import Aiosqlite
from asgi_db.drivers.statements import Effect
from asgi_db.drivers.whereabouts import Reached, Server, reached
from asgi_db.engine.unit import begin_unit
from asgi_db.engine.variants import variant_options
from asgi_db.environment import database_url_from_env, engine_options_from_env
from asgi_db.histograms import BOUNDS, BUCKETS, Histogram, no_counts
from asgi_db.logs import logger
from asgi_db.modes import ModeDefault, ReadOnly, Transactional, should_commit
from asgi_db.pool.abandoned import side_connection
from asgi_db.pool.fair import FairPool, FairQueue
from asgi_db.pool.life import MOST_VARIANTS, EngineLife
from asgi_db.profiles import POOL_PROFILES, PoolName, pool_profile
from asgi_db.replicas.history import MOST_LAG, Commit, History, Lag
from asgi_db.replicas.replica import ASK_AGAIN_AFTER
from asgi_db.sampling import Sampler
from asgi_db.settings import DatabaseType, parse_database_url
from asgi_db.sqlalchemy_versions import NEW_OPERATIONS, has_begun
from asgi_db.statistics import (
    WITHOUT_SESSION,
    Outcome,
    PoolStats,
    RouteStats,
    Statistics,
    Tally,
)
from asgi_db.tasks import run_to_completion
from asgi_db.trace import without_literals
from asgi_db.unit.block import Block
from asgi_db.unit.state import TRANSITIONS, State
from asgi_db.unit.sync_session import OPERATIONS
from asgi_db.unit.transaction import STAGES, Stage, Transaction
from asgi_db.unit.unit_of_work import UnitOfWork

__all__ = [
    "ASK_AGAIN_AFTER",
    "MOST_ROWS",
    "NEW_OPERATIONS",
    "MOST_VARIANTS",
    "Markup",
    "View",
    "duration",
    "percent",
    "rate",
    "seconds",
    "steps",
    "tag",
    "top_of",
    "AnyDriver",
    "STAGES",
    "Stage",
    "Transaction",
    "Aiosqlite",
    "BEGIN_OPTION",
    "BODY_LIMIT",
    "BOUNDS",
    "BUCKETS",
    "Beginning",
    "Block",
    "Commit",
    "DatabaseType",
    "Effect",
    "Reached",
    "Server",
    "reached",
    "EngineLife",
    "FEW",
    "FairPool",
    "FairQueue",
    "HISTORY",
    "History",
    "Histogram",
    "KINDS",
    "Lag",
    "MOST_LAG",
    "MOST_SHOWN",
    "MOST_UNITS",
    "ModeDefault",
    "OPERATIONS",
    "Outcome",
    "PINGS",
    "POOL_PROFILES",
    "Queue",
    "PoolName",
    "PoolStats",
    "ReadOnly",
    "Recorder",
    "RouteStats",
    "Sampler",
    "State",
    "Statistics",
    "TRANSITIONS",
    "Tally",
    "Transactional",
    "UnitOfInterest",
    "UnitOfWork",
    "WITHOUT_SESSION",
    "background_is_over",
    "begin_unit",
    "database_url_from_env",
    "driver_of",
    "driver_of_url",
    "engine_options_from_env",
    "cli",
    "file_system",
    "has_begun",
    "logger",
    "no_counts",
    "parse_database_url",
    "pool_profile",
    "pools_of_servers",
    "smallest_pool",
    "register",
    "run_to_completion",
    "session_key",
    "should_commit",
    "side_connection",
    "variant_options",
    "without_literals",
]
