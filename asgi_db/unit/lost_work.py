"""Work that was not committed, and what the log says of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from asgi_db.drivers.describing import brief
from asgi_db.logs import about_a_raised_error, logger
from asgi_db.modes import Mode
from asgi_db.unit.standing import Standing
from asgi_db.unit.state import LeftOver


def loses_work(unit: Standing) -> bool:
    """Return whether a ROLLBACK undoes anything that is known of.

    An attribute that was set to the value that it had is no change.
    """
    session, transaction = unit.sync_session, unit.transaction
    return (
        unit.left_over is LeftOver.DISCARDED
        or (transaction.effect.writes and transaction.is_open)
        or session is not None
        and (
            bool(session.new or session.deleted)
            or session.identity_map.check_modified()
            and any(session.is_modified(changed) for changed in session.dirty)
        )
    )


def warn_of_lost_work(unit: Standing, mode: Mode) -> None:
    """Warn that the work of a unit in this mode was rolled back, and say how to keep it."""
    remedy = "put @transactional on the route"
    logger.warning(
        "%s: uncommitted work was rolled back at the end of the %s unit: %s.",
        unit.describe(),
        mode.name,
        remedy if mode.read_only else f"commit it with `await session.commit()`, or {remedy}",
    )


def log_failed_commit(
    unit: Standing, answer: str, caller: asyncio.Task[Any] | None, error: BaseException
) -> None:
    """Log a COMMIT that failed.

    Args:
        answer: the response that waited for it; empty if none did.
        caller: the task that gets the error, unless it has been cancelled.
        error: why it failed.
    """
    unsent = f", and {answer} was not sent" if answer else ""
    is_retried = unit.mode.retries > 0 and unit.conflict is not None
    level = logging.WARNING if is_retried else logging.ERROR
    is_raised = caller is not None and not caller.cancelling()
    with about_a_raised_error() if is_raised else contextlib.nullcontext():
        logger.log(level, "%s: COMMIT failed%s: %s", unit.describe(), unsent, brief(error))
