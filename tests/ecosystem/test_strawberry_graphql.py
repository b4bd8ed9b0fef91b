"""Each mutation has a transaction of its own, over HTTP and WebSocket; a failed COMMIT is an
error in the answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any

import httpx
import strawberry
from fastapi import FastAPI
from sqlalchemy import select
from strawberry.extensions import SchemaExtension
from strawberry.fastapi import GraphQLRouter
from strawberry.types.graphql import OperationType

from asgi_db import Database, DBSession, DBSessionMiddleware, read_only
from tests.ecosystem.heroes import NO_SUCH_TEAM, Hero, heroes, serving
from tests.sockets import websocket

ACK = "connection_ack"


def application(database: Database) -> FastAPI:
    current_session = ContextVar[DBSession]("current_session")

    class TransactionForEachMutation(SchemaExtension):
        async def on_execute(self) -> AsyncGenerator[None]:
            if self.execution_context.operation_type is not OperationType.MUTATION:
                yield
                return
            async with database.transaction() as session:
                current_session.set(session)
                yield
                if self.execution_context.result.errors:
                    session.set_rollback_only()

    @strawberry.type
    class Mutation:
        @strawberry.mutation
        async def create(self, name: str, team: int | None = None) -> int:
            hero = Hero(name=name, team_id=team)
            session = current_session.get()
            session.add(hero)
            await session.flush()
            return hero.id

    @strawberry.type
    class Query:
        @strawberry.field
        async def heroes(self) -> list[str]:
            async with database.session(read_only) as session:
                return list(await session.scalars(select(Hero.name).order_by(Hero.id)))

    app = FastAPI()
    app.add_middleware(DBSessionMiddleware, database=database)
    schema = strawberry.Schema(Query, Mutation, extensions=[TransactionForEachMutation])
    app.include_router(GraphQLRouter(schema), prefix="/graphql")
    return app


async def ask(client: httpx.AsyncClient, query: str) -> Any:
    answer = await client.post("/graphql", json={"query": query})
    assert answer.status_code == 200
    return answer.json()


async def test_a_mutation_is_committed_whole_or_not_at_all(database: Database) -> None:
    async with serving(application(database), database) as client:
        answer = await ask(client, 'mutation { create(name: "ada") }')
        assert answer["data"] == {"create": 1}
        assert heroes(str(database.url)) == ["ada"]
        answer = await ask(client, "{ one: heroes other: heroes }")
        assert answer["data"] == {"one": ["ada"], "other": ["ada"]}
        answer = await ask(client, 'mutation { one: create(name: "b") two: create(name: "ada") }')
        assert answer["errors"]
        assert heroes(str(database.url)) == ["ada"]


async def test_a_failed_commit_is_an_error_in_the_answer(database: Database) -> None:
    async with serving(application(database), database) as client:
        answer = await ask(client, f'mutation {{ create(name: "c", team: {NO_SUCH_TEAM}) }}')
        assert answer["errors"] and not answer["data"]
        assert heroes(str(database.url)) == []


async def test_a_mutation_over_a_websocket_is_committed_before_its_answer(
    database: Database,
) -> None:
    app = application(database)
    async with serving(app, database):
        async with websocket(app, "/graphql", "graphql-transport-ws") as socket:
            assert json.loads(await socket.ask('{"type": "connection_init"}'))["type"] == ACK
            queries = {
                "one": 'mutation { create(name: "ada") }',
                "two": f'mutation {{ create(name: "b", team: {NO_SUCH_TEAM}) }}',
            }
            for id, query in queries.items():
                message = {"id": id, "type": "subscribe", "payload": {"query": query}}
                answer = json.loads(await socket.ask(json.dumps(message)))
                assert answer["id"] == id
                assert answer["type"] == ("next" if id == "one" else "error"), answer
                assert heroes(str(database.url)) == ["ada"]
                if id == "one":
                    assert json.loads(await socket.hear())["type"] == "complete"
