"""One task at a time: a session refuses what a second one does meanwhile, or lets it wait."""

from __future__ import annotations

import asyncio

from asgi_db.errors import ConcurrentUseError, SessionExpiredError
from asgi_db.tasks import current_task
from asgi_db.unit.operation import WAITING, Operation
from asgi_db.unit.origin import Origin
from asgi_db.unit.state import State


class OneTask:
    """A unit of work as the tasks that use it see it: what is running in it, and for which of them.

    Attributes:
        origin: the request or block that the session is for.
        loop: the event loop of the session.
        state: where the unit stands.
        operation: the running operation; in ENDING it is the end itself.
        owner: the task that began the open transaction.
    """

    origin: Origin
    loop: asyncio.AbstractEventLoop
    # Most requests never set these, so that as class attributes they cost nothing.
    state = State.IDLE
    operation: Operation | None = None
    owner: asyncio.Task[object] | None = None

    def describe(self) -> str:
        """Name the request or block, for messages."""
        return self.origin.describe()

    def check_free(self, name: str) -> None:
        """Refuse an operation if the session has ended, or if another task is using it.

        Raises:
            SessionExpiredError: the request is over.
            ConcurrentUseError: another task is in the middle of an operation, or this is another
                event loop.
        """
        if asyncio.get_running_loop() is not self.loop:
            raise ConcurrentUseError.session_in_another_loop(name, self.describe())
        self._check_open(name)
        if self.is_used_by_another_task:
            raise self.concurrent_use(name)

    def own(self, name: str) -> None:
        """Make this task the owner, unless another one is in the middle of the unit.

        Raises:
            SessionExpiredError: the request is over.
        """
        self._check_open(name)
        if not self.in_use:
            self.owner = current_task()

    def _check_open(self, name: str) -> None:
        if self.state is State.CLOSED:
            raise SessionExpiredError(name, self.describe())

    def concurrent_use(self, name: str) -> ConcurrentUseError:
        """Make the error for an operation that finds another task using the session."""
        running = "commit" if self.operation is None else self.operation.name
        return ConcurrentUseError(name, running, self.describe())

    @property
    def in_use(self) -> bool:
        """Whether there is anything to end."""
        raise NotImplementedError

    @property
    def is_used_by_another_task(self) -> bool:
        """Whether an operation is running in a task other than this one."""
        operation = self.operation
        return operation is not None and operation.task is not asyncio.current_task()

    @property
    def is_work_of_another_task(self) -> bool:
        """Whether a task other than this one is in the middle of the unit.

        A task that has ended, such as a statement in `asyncio.gather`, has handed the unit over to
        the task that waited for it.
        """
        owner = self.owner
        if owner is None or owner.done():
            owner = self.origin.task
        return self.in_use and owner not in (None, asyncio.current_task())

    @property
    def is_giving_back(self) -> bool:
        """Whether another task gives the connection back before it waits for the network."""
        return self.operation is not None and self.operation.name == WAITING

    async def wait_for_end(self) -> None:
        """Wait until a COMMIT or ROLLBACK that another task has begun is over."""
        while self.state is State.ENDING and self.operation is not None:
            task = self.operation.task
            await (asyncio.sleep(0) if task is None else asyncio.wait((task,)))

    async def wait_for_turn(self) -> None:
        """Wait while another task uses the session, if it will be done by itself.

        It gives the connection back before it waits for the body, or both tasks are tasks that the
        framework has started, which take turns.
        """
        if self.is_giving_back:
            await self.wait_for_end()
        origin, task = self.origin, asyncio.current_task()
        while (operation := self.operation) is not None and task is not None:
            other = operation.task
            if other is task or not origin.takes_turns(task):
                return
            # A COMMIT by hand runs in a task of its own.
            if self.state is not State.ENDING and (other is None or not origin.takes_turns(other)):
                return
            await origin.next_turn()
