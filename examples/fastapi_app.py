"""The four usage patterns on FastAPI: `uvicorn --app-dir examples fastapi_app:app`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from asgi_db import Database, DBSessionMiddleware
from asgi_db_fastapi import CurrentSession, CurrentSessionReadOnly, CurrentSessionTransaction
from models import Account, Base, Refused, Transfer, add_to_balance

database = Database()  # DATABASE_URL, or else the SQLite file app.db


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    await database.create_tables(Base.metadata)
    yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(DBSessionMiddleware, database=database)


@app.exception_handler(Refused)
async def refuse(request: Request, error: Refused) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=409)


@app.get("/accounts/{account_id}")
async def read_account(account_id: int, session: CurrentSessionReadOnly) -> dict[str, object]:
    """1. A read: no transaction, and no connection is held after the statement."""
    account = await session.get(Account, account_id)
    if account is None:
        raise HTTPException(404)
    return account.as_dict()


@app.post("/accounts", status_code=201)
async def open_account(owner: str, session: CurrentSession) -> dict[str, object]:
    """2. A write with a commit by hand; what the database filled in is read back."""
    account = Account(owner=owner)
    session.add(account)
    await session.commit()
    await session.refresh(account)
    return account.as_dict()


@app.post("/transfers", status_code=204)
async def transfer(order: Transfer, session: CurrentSessionTransaction) -> None:
    """3. An automatic transaction: if the second step fails, the first never happened."""
    await add_to_balance(session, order.target, order.amount)
    await add_to_balance(session, order.source, -order.amount)


@app.post("/accounts/{account_id}/deposits")
async def deposit(account_id: int, amount: int, session: CurrentSession) -> dict[str, object]:
    """4. An explicit block: it commits at its end, and rolls back if it raises."""
    async with session.begin():
        account = await add_to_balance(session, account_id, amount)
    return account.as_dict()
