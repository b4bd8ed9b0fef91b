"""Functions, with Starlette's TestClient, which serves the application in a thread."""

import pytest
from fastapi.testclient import TestClient

from tested_app.guestbook import app


@pytest.mark.parametrize("name", ["Anna", "Ben"])
def test_a_guest_is_in_the_book(name: str) -> None:
    with TestClient(app) as client:
        assert client.post("/guests", params={"name": name}).status_code == 201
        assert client.get("/guests").json() == [name]
