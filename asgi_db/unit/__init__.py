"""One unit of work: its session, its transaction, and how it ends."""
