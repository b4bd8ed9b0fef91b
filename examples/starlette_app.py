"""The four usage patterns on Starlette: `uvicorn --app-dir examples starlette_app:app`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asgi_db import Database, DBSessionMiddleware, read_only, transactional
from asgi_db_starlette import get_session
from models import Account, Base, Refused, Transfer, add_to_balance

database = Database()  # DATABASE_URL, or else the SQLite file app.db


@read_only
async def read_account(request: Request) -> Response:
    """1. A read: no transaction, and no connection is held after the statement."""
    account = await get_session(request).get(Account, request.path_params["account_id"])
    if account is None:
        raise HTTPException(404)
    return JSONResponse(account.as_dict())


async def open_account(request: Request) -> Response:
    """2. A write with a commit by hand; what the database filled in is read back."""
    session = get_session(request)
    account = Account(owner=request.query_params["owner"])
    session.add(account)
    await session.commit()
    await session.refresh(account)
    return JSONResponse(account.as_dict(), status_code=201)


@transactional
async def transfer(request: Request) -> Response:
    """3. An automatic transaction: if the second step fails, the first never happened."""
    order = Transfer(**await request.json())
    await add_to_balance(get_session(request), order.target, order.amount)
    await add_to_balance(get_session(request), order.source, -order.amount)
    return Response(status_code=204)


async def deposit(request: Request) -> Response:
    """4. An explicit block: it commits at its end, and rolls back if it raises."""
    session, amount = get_session(request), int(request.query_params["amount"])
    async with session.begin():
        account = await add_to_balance(session, request.path_params["account_id"], amount)
    return JSONResponse(account.as_dict())


async def refuse(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, status_code=409)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[None]:
    await database.create_tables(Base.metadata)
    yield


app = Starlette(
    routes=[
        Route("/accounts/{account_id:int}", read_account),
        Route("/accounts", open_account, methods=["POST"]),
        Route("/transfers", transfer, methods=["POST"]),
        Route("/accounts/{account_id:int}/deposits", deposit, methods=["POST"]),
    ],
    middleware=[Middleware(DBSessionMiddleware, database=database)],
    exception_handlers={Refused: refuse},
    lifespan=lifespan,
)
