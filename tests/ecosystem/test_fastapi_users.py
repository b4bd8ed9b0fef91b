"""Registering, logging in and changing a user, with `SQLAlchemyUserDatabase` on the request's
session; it commits itself, so the mode is `plain`.
"""

import uuid
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi_users import BaseUserManager, FastAPIUsers, UUIDIDMixin, schemas
from fastapi_users.authentication import AuthenticationBackend, BearerTransport, JWTStrategy
from fastapi_users.db import SQLAlchemyBaseUserTableUUID, SQLAlchemyUserDatabase
from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from asgi_db import Database, DBSessionMiddleware
from asgi_db_fastapi import CurrentSession
from tests.ecosystem.heroes import NO_SUCH_TEAM, Base, Team, serving
from tests.servers import sql

SECRET = "a secret of at least thirty-two characters"
EVE = {"email": "eve@example.com", "password": "correct horse"}


class User(SQLAlchemyBaseUserTableUUID, Base):
    team_id: Mapped[int | None] = mapped_column(
        ForeignKey(Team.id, deferrable=True, initially="DEFERRED")
    )


class UserRead(schemas.BaseUser[uuid.UUID]):
    team_id: int | None


class UserCreate(schemas.BaseUserCreate):
    team_id: int | None = None


class UserManager(UUIDIDMixin, BaseUserManager[User, uuid.UUID]):
    reset_password_token_secret = SECRET
    verification_token_secret = SECRET


async def provide_users(session: CurrentSession) -> SQLAlchemyUserDatabase[User, uuid.UUID]:
    return SQLAlchemyUserDatabase(session, User)


async def provide_manager(users: Annotated[Any, Depends(provide_users)]) -> UserManager:
    return UserManager(users)


def application(database: Database) -> FastAPI:
    backend = AuthenticationBackend(
        name="jwt",
        transport=BearerTransport(tokenUrl="login"),
        get_strategy=lambda: JWTStrategy(secret=SECRET, lifetime_seconds=60),
    )
    users = FastAPIUsers[User, uuid.UUID](provide_manager, [backend])
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)
    app.include_router(users.get_auth_router(backend))
    app.include_router(users.get_register_router(UserRead, UserCreate))
    app.include_router(users.get_users_router(UserRead, schemas.BaseUserUpdate), prefix="/users")
    return app


async def test_a_user_registers_logs_in_and_changes(database: Database) -> None:
    url = str(database.url)
    async with serving(application(database), database) as client:
        answer = await client.post("/register", json=EVE)
        assert answer.status_code == 201, answer.text
        assert sql(url, 'SELECT email FROM "user"') == [("eve@example.com",)]
        assert (await client.post("/register", json=EVE)).status_code == 400
        form = {"username": EVE["email"], "password": EVE["password"]}
        token = (await client.post("/login", data=form)).json()["access_token"]
        client.headers["authorization"] = f"Bearer {token}"
        assert (await client.get("/users/me")).json()["email"] == "eve@example.com"
        answer = await client.patch("/users/me", json={"email": "ada@example.com"})
        assert answer.status_code == 200, answer.text
        assert sql(url, 'SELECT email FROM "user"') == [("ada@example.com",)]


async def test_a_failed_commit_is_a_500(database: Database) -> None:
    async with serving(application(database), database) as client:
        answer = await client.post("/register", json=EVE | {"team_id": NO_SUCH_TEAM})
        assert answer.status_code == 500
        assert sql(str(database.url), 'SELECT email FROM "user"') == []
