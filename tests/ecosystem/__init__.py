"""The libraries that people combine with this one: one small application for each.

They run by `make ecosystem`, in environments of their own, and `docs/works-with.md` is the table of
what has run. `libraries.py` says which there are.
"""
