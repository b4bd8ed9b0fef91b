"""Keeps the processors busy for a while: the tests have to pass on a busy machine too."""

import argparse
import multiprocessing
import time


def main() -> None:
    """Run as many busy processes for as many seconds; all end by themselves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1800)
    options = parser.parse_args()
    print(f"{options.processes} busy processes for {options.seconds:.0f} s", flush=True)
    deadline = time.monotonic() + options.seconds
    busy = [
        multiprocessing.Process(target=spin, args=(deadline,), daemon=True)
        for _ in range(options.processes)
    ]
    for process in busy:
        process.start()
    try:
        for process in busy:
            process.join()
    except KeyboardInterrupt:
        print("ended")


def spin(deadline: float) -> None:
    """Do nothing, as fast as possible."""
    try:
        while time.monotonic() < deadline:
            sum(range(10_000))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
