"""Pytest in a process of its own, as a user runs it."""

WITHOUT_SLOW_PLUGINS = ["-p", "no:hypothesispytest", "-p", "no:faker"]
"""These load for longer than all else together, and no test of a user's project here needs them."""
