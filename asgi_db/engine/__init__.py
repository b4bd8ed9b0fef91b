"""What an engine does for the modes: how transactions begin, what may be sent, what errors mean.

One engine and one pool serve all modes. A mode whose transactions begin differently has a variant
of the engine (`Engine.execution_options()`, which shares the pool). The `info` of a pooled
connection holds what the variant asks for, and the unit of work that uses the connection.
"""
