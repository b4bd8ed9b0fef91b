"""The tables of the examples, and the one rule that they share; no framework in here."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, ForeignKeyConstraint, String, func
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The base of all tables."""


class Account(Base):
    """An account at a bank; the database itself refuses a balance below zero."""

    __tablename__ = "accounts"
    __table_args__ = (CheckConstraint("balance >= 0", name="never_overdrawn"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(100))
    balance: Mapped[int] = mapped_column(default=0)
    opened_at: Mapped[datetime] = mapped_column(server_default=func.now())

    def as_dict(self) -> dict[str, object]:
        """The account as JSON shows it."""
        return {
            "id": self.id,
            "owner": self.owner,
            "balance": self.balance,
            "opened_at": self.opened_at.isoformat(),
        }


class Product(Base):
    """Something that the shop sells."""

    __tablename__ = "products"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))


class Order(Base):
    """An order; that its product exists is checked at COMMIT, not before."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(
        ForeignKey("products.id", deferrable=True, initially="DEFERRED")
    )
    quantity: Mapped[int]


@compiles(ForeignKeyConstraint, "mysql", "mariadb")
def _check_at_once(constraint: ForeignKeyConstraint, compiler: Any, **options: Any) -> str:
    """MySQL and MariaDB have no deferred constraints: there the statement itself fails."""
    sql: str = compiler.visit_foreign_key_constraint(constraint, **options)
    return sql.replace(" DEFERRABLE INITIALLY DEFERRED", "")


@dataclass
class Transfer:
    """Money on its way from one account to another."""

    source: int
    target: int
    amount: int


class Refused(Exception):
    """Raised when an account does not exist or would be overdrawn."""


async def add_to_balance(session: AsyncSession, account_id: int, amount: int) -> Account:
    """Pay in, or out where the amount is negative; the row is locked until the transaction ends.

    Raises:
        Refused: there is no such account, or too little in it.
    """
    account = await session.get(Account, account_id, with_for_update=True)
    if account is None:
        raise Refused(f"There is no account {account_id}.")
    if account.balance + amount < 0:
        raise Refused(f"Account {account_id} holds {account.balance} only.")
    account.balance += amount
    await session.flush()
    return account
