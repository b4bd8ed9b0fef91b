"""How fast it is, beside other libraries, and how it grows.

`make bench` serves the contenders (`tests/contenders/`) side by side by a real uvicorn on private
servers, drives them by turns with the same load (`load.py`), and writes ratios and plots. The
measurements are in `contests.py` (who serves more), `traffic.py` (what goes over the wire, and how
long a connection is held), `memory.py`, `imports.py` and `cpu.py` (what it costs in a process).
"""
