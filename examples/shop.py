"""The demonstration: a small shop on FastAPI. `make serve` runs it, `make demo` tries it out.

Its database is DATABASE_URL, or else the SQLite file app.db; POOL_SIZE limits its connections.
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from asgi_db import Database, DBSessionMiddleware, PoolProfile
from asgi_db.dashboard import Dashboard
from asgi_db_fastapi import CurrentSession, CurrentSessionReadOnly, CurrentSessionTransaction
from models import Base, Order, Product

POOL_SIZE = int(os.environ.get("POOL_SIZE", "5"))
database = Database(pool=PoolProfile(pool_size=POOL_SIZE, max_overflow=0, pool_timeout=5))
PAGES = 80
downloads = 0


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    await database.create_tables(Base.metadata)
    async with database.transaction() as session:
        if await session.get(Product, 1) is None:
            session.add_all([Product(id=1, name="Teapot"), Product(id=2, name="Kettle")])
    yield


app = FastAPI(title="A small shop", lifespan=lifespan)
app.add_middleware(DBSessionMiddleware, database=database)
app.mount("/db", Dashboard(database))  # for clients on this machine alone


@app.exception_handler(IntegrityError)
async def refuse(request: Request, error: IntegrityError) -> JSONResponse:
    return JSONResponse({"detail": f"The database refused this: {error.orig}"}, status_code=409)


@app.get("/", include_in_schema=False)
async def docs() -> RedirectResponse:
    return RedirectResponse("/docs")


@app.get("/products/{product_id}")
async def read_product(product_id: int, session: CurrentSessionReadOnly) -> dict[str, object]:
    product = await session.get(Product, product_id)
    if product is None:
        raise HTTPException(404)
    return {"id": product.id, "name": product.name}


@app.post("/orders", status_code=201)
async def place_order(
    product_id: int, quantity: int, session: CurrentSessionTransaction
) -> dict[str, int]:
    """Whether the product exists is checked by the database, at COMMIT: try product 99."""
    order = Order(product_id=product_id, quantity=quantity)
    session.add(order)
    await session.flush()
    return {"order": order.id}


@app.get("/brochure")
async def download_brochure(session: CurrentSession) -> StreamingResponse:
    """A download of 5 MB, made of what was read from the database before it begins."""
    names = (await session.scalars(select(Product.name).order_by(Product.id))).all()
    page = " and ".join(names).encode().ljust(64 * 1024)
    length = {"content-length": str(PAGES * len(page))}
    return StreamingResponse(pages(page), media_type="text/plain", headers=length)


async def pages(page: bytes) -> AsyncGenerator[bytes]:
    global downloads
    downloads += 1
    try:
        for _ in range(PAGES):
            yield page
    finally:
        downloads -= 1


@app.get("/pool")
async def read_pool() -> dict[str, object]:
    """How many connections are in use, and how many downloads are going on."""
    return {"pool": database.engine.pool.status(), "downloads": downloads}
