"""The long runs: what becomes of requests when things go wrong, here and with other libraries.

`make chaos` serves each contender (`tests/contenders/`) by a real uvicorn on private servers, lets
the scenarios (`scenarios.py`) loose on it, and prints one table. The clients keep a ledger of what
they were told; what really happened is asked of the database servers over a connection of its own.
Nothing in the harness itself uses the library.
"""
