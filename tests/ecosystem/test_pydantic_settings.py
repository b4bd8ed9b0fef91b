"""The settings of the application make its `Database`, from a URL or from parts, and a password
stays a secret.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI
from pydantic import AnyUrl, PostgresDsn, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.engine import make_url

from asgi_db import Database, DBSessionMiddleware, create_database_url
from asgi_db_fastapi import CurrentSessionTransaction
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving


class WithUrl(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="SHOP_")

    database_url: PostgresDsn | AnyUrl


class WithSecretUrl(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="SHOP_")

    database_url: SecretStr
    pool: str = "low"


class WithParts(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="SHOP_DB_")

    type: str
    user: str | None = None
    password: SecretStr | None = None
    host: str | None = None
    port: int | None = None
    database: str


def from_url() -> Database:
    return Database(str(WithUrl().database_url))


def from_secret_url() -> Database:
    settings = WithSecretUrl()
    assert "password" not in repr(settings)
    return Database(settings.database_url, pool=settings.pool)


def from_parts() -> Database:
    settings = WithParts()
    assert "password='password'" not in repr(settings)
    return Database(create_database_url(**settings.model_dump()))


def application(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)

    @app.post("/heroes", status_code=201)
    async def create(
        name: str, session: CurrentSessionTransaction, team: int | None = None
    ) -> None:
        session.add(Hero(name=name, team_id=team))

    return app


@pytest.mark.parametrize("make", [from_url, from_secret_url, from_parts])
async def test_the_database_of_the_settings_is_used(
    make: object, database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = make_url(str(database.url)).set(password=database.url.password)
    monkeypatch.setenv("SHOP_DATABASE_URL", url.render_as_string(hide_password=False))
    for name, value in {
        "TYPE": url.get_backend_name(),
        "USER": url.username,
        "PASSWORD": url.password,
        "HOST": url.host,
        "PORT": url.port,
        "DATABASE": url.database,
    }.items():
        if value is not None:
            monkeypatch.setenv(f"SHOP_DB_{name}", str(value))
    assert callable(make)
    own = make()
    async with serving(application(own), own) as client:
        assert (await client.post("/heroes?name=ada")).status_code == 201
        answer = await client.post(f"/heroes?name=grace&team={NO_SUCH_TEAM}")
        assert answer.status_code == 500
    assert heroes(url.render_as_string(hide_password=False)) == ["ada"]
