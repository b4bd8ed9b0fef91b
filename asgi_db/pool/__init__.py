"""The engines of a database, and the care of their pools."""
