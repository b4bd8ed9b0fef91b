"""One WebSocket: a unit of work ends before each event, so that waiting holds no connection."""

from __future__ import annotations

import asyncio

from asgi_db.asgi.call import Call
from asgi_db.modes import should_commit
from asgi_db.types import Message


class Socket(Call):
    """One WebSocket: a unit ends before each event, so that waiting holds no connection."""

    async def run(self) -> None:
        """Run the application, then end the work that is still open after its last event."""
        self.task = asyncio.current_task()
        try:
            await self._site.app(self._scope, self._receive_between_units, self._send_after_commit)
        except BaseException as error:
            await self._end(success=False)
            if not isinstance(error, Exception):
                self._log_unanswered()
            raise
        else:
            unit = self._session.unit
            await self._end(success=unit is None or not unit.was_cancelled)
        finally:
            if (unit := self._session.unit) is not None:
                await unit.run_late_hooks()

    async def _receive_between_units(self) -> Message:
        unit = self._session.unit
        if unit is not None and not unit.is_work_of_another_task:
            unit.wanted_mode()
            await unit.end(success=self._exception_being_handled() is None)
            # The application has chosen not to answer.
            unit.unanswered = None
        return await self._receive()

    async def _send_after_commit(self, message: Message) -> None:
        unit = self._session.unit
        if unit is None:
            await self._send(message)
        elif unit.is_work_of_another_task:
            # This message, perhaps a broadcast, does not answer that work.
            await unit.wait_for_end()
            await self._send(message)
        else:
            error = self._exception_being_handled()
            success = error is None
            mode = unit.wanted_mode() or unit.mode
            if message["type"] == "websocket.http.response.start" and unit.in_use:
                success = should_commit(mode, message["status"], error)
            await self._end_before_answer(unit, success=success)
            await self._send_answer(unit, message)
            if self._late is not None:
                await self._late.raise_now()
            await unit.run_late_hooks()
