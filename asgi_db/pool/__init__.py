"""The engines of a database, and the care for their pools."""
