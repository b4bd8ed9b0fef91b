"""The dashboard as an ASGI application."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import cast

import anyio

from asgi_db.dashboard.access import Access, Allow
from asgi_db.dashboard.markup import Markup, duration, escape, tag
from asgi_db.dashboard.recorder import MOST_UNITS, Recorder
from asgi_db.dashboard.replicas import card_of
from asgi_db.dashboard.routes import SORTED_BY
from asgi_db.dashboard.sections import sections
from asgi_db.dashboard.view import View
from asgi_db.database import Database
from asgi_db.errors import ConfigurationError
from asgi_db.statistics import name_of
from asgi_db.types import Receive, Scope, Send

INTERVAL = 1.0
"""Seconds between two events for a page."""

STREAM = 5.0
"""Seconds after which an answer of events ends, and the page asks again.

A server that shuts down waits for the answers that are not complete. Each new request is asked for
its permission again, too.
"""

_STARTED = time.time()
_RUN = secrets.token_hex(4)

_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "vary": "accept",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Source: https://www.w3.org/TR/CSP3/"""


class Dashboard:
    """A live page of what the requests do to the database, as an ASGI application to mount.

        app.mount("/db", Dashboard(database, allow=is_operator))

    It shows the pool, what holds its connections now, the counters and percentiles of each route,
    and the last units of work that are worth a look, with their statements. Values are never
    shown: statements have none of their literals, and errors only their names. It shows one
    process, and says which.

    The page is whole without JavaScript; with it, it follows by server-sent events. It takes no
    connection from the pool.
    """

    def __init__(self, *databases: Database, allow: Allow | None = None) -> None:
        """Begin to watch these databases.

        Args:
            databases: the databases to show.
            allow: says whether the client of a request may see the page; gets the scope, and may
                be `async`. Without it only clients on this machine are let in, by a loopback
                address and name.

        Raises:
            ConfigurationError: there is no database, or `allow` cannot be called.
        """
        given = cast("tuple[object, ...]", databases)
        if not given or not all(isinstance(each, Database) for each in given):
            raise ConfigurationError(
                "A dashboard takes the databases that it shows: Dashboard(database)."
            )
        self._databases = databases
        self._access = Access(allow)
        for database in databases:
            Recorder.of(database)
        folder = files(__package__ or __name__)
        self._page = Template((folder / "page.html").read_text("utf-8"))
        self._css = (folder / "dashboard.css").read_text("utf-8")
        self._script = (folder / "dashboard.js").read_text("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; a WebSocket is closed."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            return
        if not await self._access.permits(scope):
            await _answer(send, 403, "You may not see this page.\n")
        elif scope["method"] != "GET":
            await _answer(send, 405, "This page can only be read.\n", {"allow": "GET"})
        elif scope["path"].removeprefix(scope.get("root_path", "")).strip("/"):
            await _answer(send, 404, "There is only one page.\n")
        else:
            columns = frozenset(SORTED_BY)
            view = View.of(scope.get("query_string", b""), len(self._databases), columns)
            headers = dict(scope["headers"])
            if headers.get(b"accept", b"").startswith(b"text/event-stream"):
                await self._stream(view, receive, send)
            else:
                nonce = secrets.token_urlsafe(16)
                policy = {"content-security-policy": _POLICY.format(nonce=nonce)}
                page = self._render(view, nonce)
                await _answer(send, 200, page, policy, content_type="text/html")

    def _render(self, view: View, nonce: str) -> str:
        database = self._databases[view.database]
        parts = sections(database, view)
        return self._page.substitute(
            {
                "css": self._css,
                "script": self._script,
                "nonce": nonce,
                "name": escape(name_of(database.url)),
                "made": escape(f"As of {time.strftime('%H:%M:%S', time.gmtime())} UTC"),
                "process": escape(_process()),
                "process_id": escape(f"process {os.getpid()}"),
                "host": escape(socket.gethostname()),
                "uptime": escape(duration(time.time() - _STARTED)),
                "databases": self._tabs(view),
                "most": escape(MOST_UNITS),
                **parts,
                "replicas": card_of(parts.get("replicas")),
            }
        )

    def _tabs(self, view: View) -> Markup:
        if len(self._databases) == 1:
            return Markup("")
        return tag(
            "nav",
            *(
                tag(
                    "a",
                    name_of(database.url),
                    href=view.link(database=number),
                    class_="chip",
                    aria_current="page" if number == view.database else None,
                )
                for number, database in enumerate(self._databases)
            ),
            class_="databases",
            aria_label="Databases",
        )

    # -- events --------------------------------------------------------------------------------

    async def _stream(self, view: View, receive: Receive, send: Send) -> None:
        """Send the parts that have changed, once a second.

        Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
        """
        headers = {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"}
        is_other = view.process not in ("", _process())
        if is_other:  # The page belongs to another worker, which the next connection may reach.
            headers["connection"] = "close"
        await _start(send, 200, headers)
        if is_other:
            await _event(send, "retry: 20\nevent: stranger\ndata: {}\n\n", more=False)
            return
        async with anyio.create_task_group() as group:

            async def end_with_client() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(end_with_client)
            await self._send_parts(view, send)
            group.cancel_scope.cancel()

    async def _send_parts(self, view: View, send: Send) -> None:
        database = self._databases[view.database]
        shown = dict[str, Markup]()
        ends = time.monotonic() + STREAM
        while True:
            parts = sections(database, view)
            changed = {name: part for name, part in parts.items() if shown.get(name) != part}
            shown = parts
            is_last = time.monotonic() + INTERVAL > ends
            event = f"retry: 200\nevent: parts\ndata: {json.dumps(changed)}\n\n"
            await _event(send, event, more=True)
            await anyio.sleep(INTERVAL)
            if is_last:
                await _event(send, "", more=False)
                return


def _process() -> str:
    """Return a name for this process that no other one has, after a fork or a restart either."""
    return f"{os.getpid()}-{_RUN}"


async def _answer(
    send: Send,
    status: int,
    text: str,
    headers: Mapping[str, str] | None = None,
    content_type: str = "text/plain",
) -> None:
    body = text.encode()
    all_headers = {
        "content-type": f"{content_type}; charset=utf-8",
        "content-length": str(len(body)),
        "content-security-policy": "default-src 'none'",
        **(headers or {}),
    }
    await _start(send, status, all_headers)
    await send({"type": "http.response.body", "body": body})


async def _start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    fields = {**_HEADERS, **headers}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
    )


async def _event(send: Send, text: str, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
