"""One WebSocket."""

from __future__ import annotations

import asyncio

from asgi_db.asgi.call import Call
from asgi_db.modes import should_commit
from asgi_db.types import Message


class Socket(Call):
    """One WebSocket: a unit ends before each event, so that waiting holds nothing."""

    async def run(self) -> None:
        """Run the application, then end what its last event has left open."""
        app = self._middleware.app
        self.task = asyncio.current_task()
        try:
            await app(self._scope, self._receive_between_units, self._send_after_commit)
        except BaseException as error:
            await self._end(success=False)
            if not isinstance(error, Exception):
                self._log_unanswered()
            raise
        else:
            await self._end(success=self._unit is None or not self._unit.was_cut_off)
        finally:
            if self._unit is not None:
                await self._unit.run_late_hooks()

    async def _receive_between_units(self) -> Message:
        unit = self._unit
        if unit is not None and not unit.is_work_of_another_task:
            await unit.end(success=self._exception_being_handled() is None)
            unit.is_unanswered = False  # the application has chosen to say nothing
        return await self._receive()

    async def _send_after_commit(self, message: Message) -> None:
        unit = self._unit
        if unit is None:
            await self._send(message)
        elif unit.is_work_of_another_task:  # this is not the answer to it: a broadcast, say
            await unit.wait_for_end()
            await self._send(message)
        else:
            error = self._exception_being_handled()
            success = error is None
            if message["type"] == "websocket.http.response.start" and unit.in_use:
                success = should_commit(unit.mode, message["status"], error)
            await self._end_before_answer(unit, success=success)
            await self._send_answer(unit, message)
            await self._be_cancelled_late()
            await unit.run_late_hooks()
