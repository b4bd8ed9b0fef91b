"""Sessions outside requests, for scripts, jobs and tests: `python examples/script.py`."""

import asyncio

from sqlalchemy import select

from asgi_db import Database, read_only
from models import Account, Base, Refused, add_to_balance


async def main() -> None:
    async with Database() as database:  # DATABASE_URL, or else the SQLite file app.db
        await database.create_tables(Base.metadata)

        async with database.transaction() as session:  # commits at its end
            anna, ben = Account(owner="Anna", balance=100), Account(owner="Ben", balance=0)
            session.add_all([anna, ben])

        try:
            async with database.transaction() as session:  # rolls back, because it raises
                await add_to_balance(session, ben.id, 500)
                await add_to_balance(session, anna.id, -500)
        except Refused as refusal:
            print(f"refused: {refusal}")

        async with database.session() as session:  # rolls back what is not committed by hand
            await add_to_balance(session, ben.id, 30)
            await add_to_balance(session, anna.id, -30)
            await session.commit()

        async with database.session(read_only) as session:  # no transaction, reads alone
            for account in await session.scalars(select(Account).order_by(Account.id)):
                print(f"{account.owner}: {account.balance}")


if __name__ == "__main__":
    asyncio.run(main())
