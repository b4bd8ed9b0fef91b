"""SQLAlchemy alone on FastAPI, as most applications have it: `Depends(get_db)`, with a pre-ping.

The dependency opens and closes the session; who writes commits by hand.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from tests.contenders.routes import add_routes
from tests.contenders.shared import POOL, URL, item

engine = create_async_engine(URL, pool_pre_ping=True, **POOL)
SessionLocal = async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


async def get_db() -> AsyncGenerator[AsyncSession]:
    async with SessionLocal() as session:
        yield session


@app.post("/items/{id}", status_code=201)
async def write(id: int, session: Annotated[AsyncSession, Depends(get_db)]) -> None:
    session.add(item(id))
    await session.commit()


add_routes(app, get_db)
