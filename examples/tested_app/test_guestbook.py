"""Coroutines, with pytest-asyncio (asyncio_mode) as with anyio (anyio_mode): both find them."""

import httpx
import pytest
from sqlalchemy.exc import IntegrityError

from tested_app.guestbook import Guest, database


@pytest.mark.parametrize("name", ["Anna", "Ben"])
async def test_a_guest_is_in_the_book(client: httpx.AsyncClient, name: str) -> None:
    response = await client.post("/guests", params={"name": name})
    assert response.status_code == 201
    assert (await client.get("/guests")).json() == [name]


async def test_the_application_sees_what_the_test_has_committed(client: httpx.AsyncClient) -> None:
    async with database.transaction() as session:
        session.add(Guest(name="Anna"))
    assert (await client.get("/guests")).json() == ["Anna"]
    with pytest.raises(IntegrityError):
        await client.post("/guests", params={"name": "Anna"})
    assert (await client.get("/guests")).json() == ["Anna"]
