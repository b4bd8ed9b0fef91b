"""The four usage patterns on Litestar: `uvicorn --app-dir examples litestar_app:app`."""

from typing import Any

from litestar import Litestar, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, FromQuery, RequestBody

from asgi_db import Database, DBSession, transactional
from asgi_db_litestar import DatabasePlugin
from models import Account, Base, Refused, Transfer, add_to_balance

Session = NamedDependency[DBSession]
database = Database()  # DATABASE_URL, or else the SQLite file app.db


@get("/accounts/{account_id:int}")
async def read_account(
    account_id: FromPath[int], db_session_read_only: Session
) -> dict[str, object]:
    """1. A read: no transaction, and no connection is held after the statement."""
    account = await db_session_read_only.get(Account, account_id)
    if account is None:
        raise NotFoundException
    return account.as_dict()


@post("/accounts")
async def open_account(owner: FromQuery[str], db_session: Session) -> dict[str, object]:
    """2. A write with a commit by hand; what the database filled in is read back."""
    account = Account(owner=owner)
    db_session.add(account)
    await db_session.commit()
    await db_session.refresh(account)
    return account.as_dict()


@post("/transfers", opt={"db": transactional}, status_code=204)
async def transfer(data: RequestBody[Transfer], db_session: Session) -> None:
    """3. An automatic transaction: if the second step fails, the first never happened."""
    await add_to_balance(db_session, data.target, data.amount)
    await add_to_balance(db_session, data.source, -data.amount)


@post("/accounts/{account_id:int}/deposits", status_code=200)
async def deposit(
    account_id: FromPath[int], amount: FromQuery[int], db_session: Session
) -> dict[str, object]:
    """4. An explicit block: it commits at its end, and rolls back if it raises."""
    async with db_session.begin():
        account = await add_to_balance(db_session, account_id, amount)
    return account.as_dict()


def refuse(request: Request[Any, Any, Any], error: Refused) -> Response[dict[str, str]]:
    return Response({"detail": str(error)}, status_code=409)


async def create_tables() -> None:
    await database.create_tables(Base.metadata)


app = Litestar(
    [read_account, open_account, transfer, deposit],
    plugins=[DatabasePlugin(database)],
    exception_handlers={Refused: refuse},
    on_startup=[create_tables],
)
