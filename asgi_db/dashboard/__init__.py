"""A live page of what the requests do to the database."""
