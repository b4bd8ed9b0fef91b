# Not installed where types are checked.
# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

"""advanced-alchemy on Litestar, with `before_send_handler="autocommit"`.

Where there are replicas, it uses the library's routing.

Its plugin ends sessions with the response; sockets use its session factory.
"""

import asyncio

from advanced_alchemy.config.routing import RoutingConfig
from advanced_alchemy.extensions.litestar import (
    AsyncSessionConfig,
    EngineConfig,
    SQLAlchemyAsyncConfig,
    SQLAlchemyPlugin,
)
from litestar import Litestar, WebSocket, get, post, websocket
from litestar.exceptions import NotFoundException, WebSocketDisconnect
from litestar.response import Stream
from sqlalchemy.ext.asyncio import AsyncSession

from tests.contenders.shared import (
    ENGINE,
    EVENT,
    FIRST_VALUE,
    REPLICA_URLS,
    URL,
    Item,
    item,
    long,
    megabytes,
    pieces,
    sleep,
)

where = {"connection_string": URL}
if REPLICA_URLS:
    routing = RoutingConfig(primary_connection_string=URL, read_replicas=REPLICA_URLS)
    where = {"routing_config": routing}
config = SQLAlchemyAsyncConfig(
    **where,
    session_config=AsyncSessionConfig(expire_on_commit=False),
    engine_config=EngineConfig(**ENGINE),
    before_send_handler="autocommit",
)


def checked_out() -> int:
    return config.get_engine().pool.checkedout()


@get("/nothing")
async def nothing() -> None:
    pass


@get("/items/{id:int}")
async def read(id: int, db_session: AsyncSession) -> dict:
    found = await db_session.get(Item, id)
    if found is None:
        raise NotFoundException
    return {"id": found.id, "value": found.value}


@post("/items/{id:int}")
async def write(id: int, db_session: AsyncSession) -> None:
    db_session.add(item(id))


@post("/slow/{id:int}")
async def write_slowly(id: int, seconds: float, db_session: AsyncSession) -> None:
    await db_session.execute(sleep(seconds))
    db_session.add(item(id))


@post("/pair/{id:int}")
async def write_pair(id: int, seconds: float, db_session: AsyncSession) -> None:
    db_session.add(item(id))
    await db_session.flush()
    await asyncio.sleep(seconds)
    db_session.add(item(-id))


@get("/long")
async def wait(seconds: int, db_session: AsyncSession) -> Stream:
    return Stream(pieces(lambda: db_session.scalar(long(seconds)), 1, 0))


@get("/stream")
async def stream(chunks: int, seconds: float, db_session: AsyncSession) -> Stream:
    return Stream(pieces(lambda: db_session.scalar(FIRST_VALUE), chunks, seconds))


@get("/events")
async def events(chunks: int, seconds: float, db_session: AsyncSession) -> Stream:
    body = pieces(lambda: db_session.scalar(FIRST_VALUE), chunks, seconds, EVENT)
    return Stream(body, media_type="text/event-stream")


@get("/big")
async def big(db_session: AsyncSession) -> Stream:
    await db_session.scalar(FIRST_VALUE)
    return Stream(megabytes())


@websocket("/ws")
async def talk(socket: WebSocket) -> None:
    await socket.accept()
    try:
        while True:
            message = await socket.receive_text()
            async with config.get_session() as session, session.begin():
                session.add(item(int(message)))
            await socket.send_text("ok")
    except WebSocketDisconnect:
        pass


app = Litestar(
    [nothing, read, write, write_slowly, write_pair, wait, stream, events, big, talk],
    plugins=[SQLAlchemyPlugin(config=config)],
)
