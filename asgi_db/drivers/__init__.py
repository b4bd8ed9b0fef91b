"""One file for each database: what asgi-db has to know of it, and of its driver."""
