"""The servers which the tests start: their programs, packages, and replacements.

Standard library only, because `scripts/prepare.py` uses it before anything is installed.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

# Debian keeps servers where an ordinary user's PATH does not look.
_MORE_FOLDERS = ["/usr/sbin", "/usr/local/sbin", "/usr/libexec"]


@dataclass(frozen=True)
class Program:
    """What the tests start."""

    name: str
    programs: list[str]
    packages: list[str]

    @property
    def missing(self) -> list[str]:
        """The programs that are not on this machine."""
        return [program for program in self.programs if find(program) is None]

    @property
    def wanted(self) -> bool:
        """Whether it has to be installed."""
        return bool(self.missing)

    @property
    def advice(self) -> str:
        """What to do where programs are missing."""
        return (
            f"{self.name} is missing ({', '.join(self.missing)}): "
            f"run `apt-get install {' '.join(self.packages)}` as root"
        )


@dataclass(frozen=True)
class Server(Program):
    """A kind of database server."""

    variable: str
    """The environment variable with the URL of a server to use instead of a private one."""
    example: str

    @property
    def url(self) -> str | None:
        """The URL of the server to use instead of a private one."""
        return os.environ.get(self.variable)

    @property
    def wanted(self) -> bool:
        return not self.url and super().wanted

    @property
    def advice(self) -> str:
        return (
            f"{super().advice}, or set {self.variable} "
            f"to a server on which the tests may create databases, such as {self.example}"
        )


@dataclass(frozen=True)
class Library(Program):
    """A library that a server loads, under its path."""

    @property
    def library(self) -> str:
        """Its path."""
        return self.programs[0]

    @property
    def missing(self) -> list[str]:
        return [program for program in self.programs if not Path(program).exists()]


@dataclass(frozen=True)
class Browser(Program):
    """A browser, which the tests drive where the system has a package of it."""

    @property
    def is_packaged(self) -> bool:
        """Whether the packages are programs: Ubuntu's are not, and install a daemon instead."""
        release = Path("/etc/os-release")
        return release.exists() and "ID=debian" in release.read_text().splitlines()

    @property
    def wanted(self) -> bool:
        return self.is_packaged and super().wanted


def find(program: str) -> str | None:
    """The path of a program; of several versions of PostgreSQL the newest."""
    versions = [p for p in Path("/usr/lib/postgresql").glob("*/bin") if p.parent.name.isdigit()]
    newest_first = sorted(versions, key=lambda path: int(path.parent.name), reverse=True)
    folders = [os.environ.get("PATH", os.defpath), *map(str, newest_first), *_MORE_FOLDERS]
    return shutil.which(program, path=os.pathsep.join(folders))


POSTGRESQL = Server(
    name="PostgreSQL",
    programs=["initdb", "postgres"],
    packages=["postgresql"],
    variable="ASGI_DB_TEST_POSTGRESQL_URL",
    example="postgresql+asyncpg://user:password@localhost/postgres",
)
MARIADB = Server(
    name="MariaDB",
    programs=["mariadbd", "mariadb-install-db", "my_print_defaults"],
    packages=["mariadb-server-core", "mariadb-client-core"],
    variable="ASGI_DB_TEST_MYSQL_URL",
    example="mysql+asyncmy://user:password@localhost/mysql",
)
PGBOUNCER = Program(name="PgBouncer", programs=["pgbouncer"], packages=["pgbouncer"])
GALERA = Library(
    name="Galera", programs=["/usr/lib/galera/libgalera_smm.so"], packages=["galera-4"]
)
SERVERS = [POSTGRESQL, MARIADB, PGBOUNCER, GALERA]
REDIS = Program(name="Redis", programs=["redis-server"], packages=["redis-server"])
ECOSYSTEM = [POSTGRESQL, REDIS]
"""What `make ecosystem` needs."""
WRK = Program(name="wrk", programs=["wrk"], packages=["wrk"])
"""The load of `make bench`; no test needs it."""
CHROMIUM = Browser(
    name="Chromium",
    programs=["chromium", "chromedriver"],
    packages=["chromium", "chromium-driver", "fonts-inter"],
)
VALGRIND = Program(name="valgrind", programs=["valgrind"], packages=["valgrind"])
"""It counts for `make count`; no test needs it."""
