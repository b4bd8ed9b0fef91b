# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""advanced-alchemy on FastAPI, with `commit_mode="autocommit"`.

Where there are replicas, it uses the library's routing.

Its dependency is for HTTP alone; sockets use its session factory.
"""

from advanced_alchemy.config.routing import RoutingConfig
from advanced_alchemy.extensions.fastapi import (
    AdvancedAlchemy,
    AsyncSessionConfig,
    EngineConfig,
    SQLAlchemyAsyncConfig,
)
from fastapi import FastAPI, WebSocket

from tests.contenders.routes import add_routes
from tests.contenders.shared import ENGINE, REPLICA_URLS, URL, item

where = {"connection_string": URL}
if REPLICA_URLS:
    routing = RoutingConfig(primary_connection_string=URL, read_replicas=REPLICA_URLS)
    where = {"routing_config": routing}
config = SQLAlchemyAsyncConfig(
    **where,
    session_config=AsyncSessionConfig(expire_on_commit=False),
    engine_config=EngineConfig(**ENGINE),
    commit_mode="autocommit",
)
app = FastAPI()
alchemy = AdvancedAlchemy(config=config, app=app)


def checked_out() -> int:
    return config.get_engine().pool.checkedout()


add_routes(app, alchemy.provide_session())


@app.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        async with alchemy.with_async_session() as session:
            session.add(item(int(message)))
            await session.commit()
        await websocket.send_text("ok")
