"""What users import: its names, its documentation, its errors, and what it does not bring along."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy.exc import InvalidRequestError, OperationalError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

import asgi_db
import asgi_db.opentelemetry
import asgi_db.prometheus
import asgi_db_fastapi
import asgi_db_litestar
import asgi_db_pytest
import asgi_db_starlette
from asgi_db import (
    ConcurrentUseError,
    ConfigurationError,
    DatabaseBusyError,
    DatabaseConflictError,
    DatabaseDownError,
    DatabaseTimeoutError,
    FailedTransactionError,
    MissingMiddlewareError,
    ModeConflictError,
    OutcomeUnknownError,
    ReadOnlyError,
    SandboxError,
    SessionExpiredError,
    StatementTimeoutError,
    UnavailableError,
    UncommittedWorkError,
    errors,
    session_of,
)

PACKAGES: list[ModuleType] = [
    asgi_db,
    asgi_db_fastapi,
    asgi_db_litestar,
    asgi_db_pytest,
    asgi_db_starlette,
]
FRAMEWORKS = {"fastapi", "litestar", "starlette"}


# -- names -------------------------------------------------------------------------------------


def test_the_core_exports_the_names_of_the_design() -> None:
    assert set(asgi_db.__all__) == {
        "Database",
        "DBSessionMiddleware",
        "DBSession",
        "plain",
        "transactional",
        "read_only",
        "by_method",
        "create_database_url",
        "uuid4_str",
        "Readiness",
        # the errors
        "ConcurrentUseError",
        "ConfigurationError",
        "DatabaseBusyError",
        "DatabaseConflictError",
        "DatabaseDownError",
        "DatabaseTimeoutError",
        "FailedTransactionError",
        "MissingMiddlewareError",
        "ModeConflictError",
        "OutcomeUnknownError",
        "ReadOnlyError",
        "SandboxError",
        "UnavailableError",
        "SessionExpiredError",
        "StatementTimeoutError",
        "UncommittedWorkError",
        # for annotations, and for who adapts another framework
        "Mode",
        "PoolProfile",
        "session_of",
    }


def test_the_adapters_export_the_names_of_the_design() -> None:
    assert set(asgi_db_fastapi.__all__) == {
        "get_db",
        "get_db_transaction",
        "get_db_read_only",
        "CurrentSession",
        "CurrentSessionTransaction",
        "CurrentSessionReadOnly",
    }
    assert asgi_db_litestar.__all__ == ["DatabasePlugin"]
    assert set(asgi_db_pytest.__all__) == {
        "Capture",
        "asgi_db_database",
        "capture_statements",
        "sandbox",
    }
    assert set(asgi_db_starlette.__all__) == {"get_session", "lifespan"}


def test_the_optional_modules_export_what_makes_them_work() -> None:
    assert asgi_db.opentelemetry.__all__ == ["instrument"]
    assert asgi_db.prometheus.__all__ == ["DatabaseCollector"]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_exported_name_is_there_and_in_order(package: ModuleType) -> None:
    names: list[str] = package.__all__
    assert names == sorted(names)
    for name in names:
        assert hasattr(package, name)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_package_says_that_it_is_typed(package: ModuleType) -> None:
    assert Path(package.__path__[0], "py.typed").is_file()


# -- documentation -----------------------------------------------------------------------------


def modules() -> Iterator[ModuleType]:
    for package in PACKAGES:
        yield package
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(found.name)


def documented(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Everything public that the module itself defines, with its name."""
    yield module.__name__, module
    for name, member in public(module):
        if callable(member) and getattr(member, "__module__", None) == module.__name__:
            yield f"{module.__name__}.{name}", member
            for part, function in public(member) if isinstance(member, type) else ():
                if inspect.isroutine(function) or isinstance(function, (property, classmethod)):
                    yield f"{module.__name__}.{name}.{part}", getattr(member, part)


def public(holder: object) -> list[tuple[str, object]]:
    return [(name, member) for name, member in vars(holder).items() if not name.startswith("_")]


def test_everything_public_has_a_docstring() -> None:
    missing = [
        name
        for module in modules()
        for name, member in documented(module)
        if not inspect.getdoc(member)
    ]
    assert missing == []


def test_what_users_call_is_documented_in_whole_sentences() -> None:
    for package in PACKAGES:
        for name in package.__all__:
            documentation = inspect.getdoc(getattr(package, name)) or ""
            assert documentation.partition("\n\n")[0].endswith("."), name


# -- errors ------------------------------------------------------------------------------------

BASES: dict[type[Exception], type[Exception]] = {
    ConcurrentUseError: RuntimeError,
    ConfigurationError: ValueError,
    FailedTransactionError: PendingRollbackError,
    MissingMiddlewareError: RuntimeError,
    ModeConflictError: RuntimeError,
    ReadOnlyError: InvalidRequestError,
    SandboxError: InvalidRequestError,
    SessionExpiredError: RuntimeError,
    StatementTimeoutError: OperationalError,
    UncommittedWorkError: InvalidRequestError,
    DatabaseBusyError: PoolTimeoutError,
    DatabaseConflictError: OperationalError,
    DatabaseDownError: OperationalError,
    DatabaseTimeoutError: TimeoutError,
    OutcomeUnknownError: DatabaseDownError,
    UnavailableError: Exception,
}


def test_every_error_is_exported_and_derives_from_what_users_already_catch() -> None:
    defined = {
        member
        for _, member in inspect.getmembers(errors, inspect.isclass)
        if member.__module__ == errors.__name__
    }
    assert defined == set(BASES)
    for error, base in BASES.items():
        assert error.__bases__ in ((base,), (UnavailableError, base), (DatabaseTimeoutError, base))
        assert error.__name__ in asgi_db.__all__


@pytest.mark.parametrize("error", BASES, ids=lambda error: error.__name__)
def test_every_error_says_when_it_is_raised(error: type[Exception]) -> None:
    assert (error.__doc__ or "").startswith("Raised ")


@pytest.mark.parametrize(
    ("error", "cause", "remedies"),
    [
        (
            MissingMiddlewareError("analytics"),
            "no database session 'analytics'",
            ["app.add_middleware(DBSessionMiddleware, key='analytics')", "DatabasePlugin"],
        ),
        (
            ModeConflictError.too_late("transactional", "plain", "GET /orders"),
            "GET /orders: the transactional mode was asked for after work in the plain mode",
            ["@transactional", "await session.commit()", "database.transaction()"],
        ),
        (
            ModeConflictError.at_odds("transactional(1)", "transactional(2)", "GET /orders"),
            "GET /orders: transactional(1) was asked for, and transactional(2) by another",
            ["put the one that is meant on the route"],
        ),
        (
            SessionExpiredError("execute", "GET /orders"),
            "session.execute() was called after GET /orders had ended",
            ["async with database.session()", "database.transaction()"],
        ),
        (
            ConcurrentUseError("commit", "execute", "GET /orders"),
            "GET /orders: session.commit() was called while session.execute() was still running",
            ["await the statements one after the other", "async with database.session()"],
        ),
        (
            FailedTransactionError(statement_failed=True),
            "A statement of this transaction failed",
            ["Let the error out", "async with session.begin_nested()"],
        ),
        (
            FailedTransactionError(statement_failed=False),
            "was terminated when the database was disposed",
            ["before `await database.dispose()`"],
        ),
        (
            DatabaseBusyError("GET /orders", ["POST /orders for 2.1 s"]),
            "GET /orders: no connection became free in time. The pool is held by: POST /orders",
            ["await session.release()", "pool_size"],
        ),
        (
            UncommittedWorkError("GET /orders", is_lost=False),
            "GET /orders: session.release() would throw away writes",
            ["await session.commit()", "await session.rollback()"],
        ),
        (
            UncommittedWorkError("GET /orders", is_lost=True),
            "GET /orders: the handler closed the session",
            ["Leave the session open", "await session.commit()"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_message_names_the_cause_and_the_remedy(
    error: Exception, cause: str, remedies: list[str]
) -> None:
    message = str(error)
    assert cause in message
    for remedy in remedies:
        assert remedy in message
        assert message.index(cause) < message.index(remedy)


def test_without_a_middleware_the_error_names_the_key() -> None:
    with pytest.raises(MissingMiddlewareError, match="'analytics'"):
        session_of({"type": "http"}, key="analytics")


# -- what is not brought along -----------------------------------------------------------------


def loaded_by(package: str) -> set[str]:
    """The packages, beside the standard library, which an import of this one loads."""
    program = f"""
import json, sys
before = set(sys.modules)
import {package}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(new - sys.stdlib_module_names)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    packages = set(json.loads(done.stdout))
    return {name for name in packages if not name.startswith(("_", "cython"))}


def test_the_core_needs_sqlalchemy_and_anyio_alone() -> None:
    loaded = loaded_by("asgi_db")
    assert {"asgi_db", "sqlalchemy", "anyio"} <= loaded
    # what these two themselves need
    assert loaded <= {"asgi_db", "sqlalchemy", "anyio", "greenlet", "idna", "sniffio"} | {
        "exceptiongroup",
        "typing_extensions",
    }


@pytest.mark.parametrize(
    ("module", "needs"),
    [("opentelemetry", "opentelemetry"), ("prometheus", "prometheus_client")],
)
def test_what_an_optional_module_needs_is_named_with_its_remedy(module: str, needs: str) -> None:
    program = f"import sys; sys.modules[{needs!r}] = None; import asgi_db.{module}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: asgi_db.{module} needs" in done.stderr
    assert f'pip install "asgi-db[{module}]"' in done.stderr


@pytest.mark.parametrize(
    ("adapter", "framework"),
    [
        ("asgi_db_fastapi", {"fastapi", "starlette"}),
        ("asgi_db_litestar", {"litestar"}),
        ("asgi_db_pytest", set[str]()),
        ("asgi_db_starlette", {"starlette"}),
    ],
)
def test_an_adapter_loads_its_own_framework_alone(adapter: str, framework: set[str]) -> None:
    assert loaded_by(adapter) & FRAMEWORKS == framework


def test_no_module_of_the_core_imports_a_framework() -> None:
    for path in Path(asgi_db.__path__[0]).glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not FRAMEWORKS & {name.partition(".")[0] for name in names}, path
