"""A shop with a dashboard, and a load for it: what the browser looks at."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import httpx
import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import RedirectResponse
from sqlalchemy import ForeignKey, String, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asgi_db import Database, DBSessionMiddleware, PoolProfile, transactional
from asgi_db.dashboard import Dashboard
from asgi_db.types import Scope
from asgi_db_fastapi import CurrentSession, CurrentSessionReadOnly, CurrentSessionTransaction

SECRET = "Agnes-Grey-1847"
"""A name that stands in the database, in parameters and in literals, and never on the page."""

COOKIE = "operator=yes"


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "products"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    stock: Mapped[int]


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey(Product.id))
    customer: Mapped[str] = mapped_column(String(100))


class Shop:
    """The shop, served by uvicorn in a thread of its own.

    Attributes:
        database: its database.
        address: where it is served.
        held: set while `/held` waits; it ends when `release` is set.
    """

    def __init__(self, url: str, *, replicas: Sequence[str] = ()) -> None:
        self.held, self.release = threading.Event(), threading.Event()
        pool = PoolProfile(8, max_overflow=2, pool_timeout=2)
        self.database = Database(url, replicas=replicas, pool=pool, leak_threshold=2)
        self._socket = socket.create_server(("127.0.0.1", 0))
        port = self._socket.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(self._app(), log_level="critical", timeout_graceful_shutdown=10)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Shop:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=120, trust_env=False)

    def _app(self) -> FastAPI:
        database = self.database

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
            await database.create_tables(Base.metadata)
            async with database.transaction() as session:
                session.add_all(Product(id=n, name=f"Teapot {n}", stock=1000) for n in range(1, 40))
            yield

        app = FastAPI(lifespan=lifespan)
        app.add_middleware(DBSessionMiddleware, database=database)
        app.include_router(router)
        app.state.shop = self
        app.mount("/db", Dashboard(database, allow=is_operator))
        return app


async def is_operator(scope: Scope) -> bool:
    return (b"cookie", COOKIE.encode()) in scope["headers"]


router = APIRouter()


@router.get("/")
async def start() -> RedirectResponse:
    return RedirectResponse("/db/")


@router.get("/products/{product_id}")
async def read_product(product_id: int, session: CurrentSessionReadOnly) -> str:
    product = await session.get(Product, product_id)
    if product is None:
        raise HTTPException(404)
    return product.name


@router.post("/orders")
async def place_order(product_id: int, session: CurrentSessionTransaction) -> int:
    order = Order(product_id=product_id, customer=SECRET)
    session.add(order)
    await session.flush()
    return order.id


@router.post("/stock/{product_id}/take")
@transactional(isolation="SERIALIZABLE", retries=5)
async def take_from_stock(product_id: int, session: CurrentSession) -> None:
    product = await session.get_one(Product, product_id)
    await asyncio.sleep(0.01)
    product.stock -= 1


@router.get("/catalogue")
async def read_catalogue(session: CurrentSessionReadOnly) -> list[str]:
    ids = await session.scalars(select(Product.id).order_by(Product.id).limit(12))
    names = [await session.scalar(select(Product.name).where(Product.id == n)) for n in ids]
    return [name or "" for name in names]


@router.get("/reports/{year}")
async def yearly_report(year: int, session: CurrentSession, seconds: float = 0.7) -> Any:
    query = f"SELECT count(*) FROM orders WHERE customer <> '{SECRET}' AND id > {year}"
    count = await session.scalar(text(query))
    await asyncio.sleep(seconds)
    return count


@router.post("/reminders")
async def send_reminders(session: CurrentSession) -> None:
    session.add(Order(product_id=1, customer=SECRET))
    await session.flush()  # and no commit


@router.get("/held")
async def hold_a_connection(request: Request, session: CurrentSession) -> None:
    shop: Shop = request.app.state.shop
    await session.scalar(select(func.count()).select_from(Product))
    shop.held.set()
    while not shop.release.is_set():  # noqa: ASYNC110 - a test sets it in another thread
        await asyncio.sleep(0.02)
    shop.held.clear()


# -- the load ----------------------------------------------------------------------------------

_LOAD = [
    (60, "GET", "/products/{n}"),
    (14, "POST", "/orders?product_id={n}"),
    (10, "POST", "/stock/1/take"),
    (3, "GET", "/catalogue"),
    (2, "GET", "/reports/1999?seconds={s}"),
    (1, "POST", "/orders?product_id=0"),
    (1, "POST", "/reminders"),
    (9, "GET", "/"),
]


@contextmanager
def load(shop: Shop, *, clients: int = 4, pause: float = 0.1) -> Generator[None]:
    """Let so many clients send requests while the block lasts."""
    ended = threading.Event()
    threads = [
        threading.Thread(target=_ask, args=(shop, number, pause, ended))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _ask(shop: Shop, seed: int, pause: float, ended: threading.Event) -> None:
    chance = random.Random(seed)
    weights = [weight for weight, _, _ in _LOAD]
    with shop.client() as client:
        while not ended.wait(chance.expovariate(1 / pause)):
            ((_, method, path),) = chance.choices(_LOAD, weights)
            path = path.format(n=chance.randint(1, 45), s=chance.expovariate(1))
            with suppress(httpx.HTTPError):
                client.request(method, path)
