"""What `make` needs first: a virtual environment, the servers and browser of the tests, and a load.

Standard library only: it runs on a machine where nothing has been installed yet.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from tests.programs import CHROMIUM, ECOSYSTEM, SERVERS, VALGRIND, WRK, Program

# Run as root. A fresh machine has no package lists; another `make` may hold the lock. Only the
# programs are wanted: PostgreSQL is to make no cluster, and so no service; the services of
# PgBouncer and Redis are neither to be started (`policy-rc.d` forbids it) nor to be there after the
# next boot.
INSTALL = """
set -e
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
remove=
trap 'rm -f $remove' EXIT
case " $* " in *" postgresql "*)
    no_cluster=/etc/postgresql-common/createcluster.d/asgi-db-$$.conf
    remove=$no_cluster
    mkdir -p "$(dirname "$no_cluster")"
    echo "create_main_cluster = false" >"$no_cluster"
esac
case " $* " in *" pgbouncer "*|*" redis-server "*)
    if [ ! -e $policy ]; then
        remove="$remove $policy"
        printf '#!/bin/sh\\nexit 101\\n' >$policy
        chmod +x $policy
    fi
esac
apt-get update -qq || true
apt-get install -qq --yes --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"
for service in pgbouncer redis-server; do
    case " $* " in *" $service "*)
        update-rc.d $service disable
    esac
done
"""


def main(arguments: list[str]) -> None:
    match arguments:
        case ["venv", directory]:
            make_environment(directory)
        case ["servers"]:
            install_missing([*SERVERS, CHROMIUM])
        case ["ecosystem"]:
            install_missing(ECOSYSTEM)
        case ["chaos"]:
            install_missing(SERVERS)
        case ["load"]:
            install_missing([WRK])
        case ["count"]:
            install_missing([VALGRIND])
        case _:
            commands = "venv DIRECTORY | servers | ecosystem | chaos | load | count"
            sys.exit(f"usage: python -m scripts.prepare ({commands})")


def make_environment(directory: str) -> None:
    """A virtual environment with a current pip (the system's may not know dependency groups)."""
    if importlib.util.find_spec("ensurepip") is None:  # Debian ships it in a package of its own
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
        if not install([package]):
            sys.exit(f"Python's venv is missing: run `apt-get install {package}` as root.")
    print(f"making the environment {directory}", flush=True)
    subprocess.run(
        [sys.executable, "-m", "venv", "--clear", "--upgrade-deps", directory], check=True
    )


def install_missing(programs: Sequence[Program]) -> None:
    """Installs the programs which are neither here nor replaced by a URL."""
    wanted = [program for program in programs if program.wanted]
    if wanted:
        install([package for program in wanted for package in program.packages])
    if advice := [program.advice for program in wanted if program.wanted]:
        sys.exit("\n".join(advice))


def install(packages: list[str]) -> bool:
    """Installs system packages where this user may; False where it may not or where it failed."""
    command = ["sh", "-c", INSTALL, "install", *packages]
    if os.geteuid() != 0:
        command = ["sudo", "--non-interactive", *command]
        if not shutil.which("sudo") or not _quietly("sudo", "--non-interactive", "true"):
            return False
    if not shutil.which("apt-get"):
        return False
    print(f"installing {' '.join(packages)}", flush=True)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return done.returncode == 0


def _quietly(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


if __name__ == "__main__":
    main(sys.argv[1:])
