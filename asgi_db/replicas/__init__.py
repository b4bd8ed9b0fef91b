"""The replicas of a database, and which of them a read may go to.

A commit has a position, which the client is told and sends back. A unit of work that only reads
runs on a replica which has reached the position of its client, or else on the primary.
"""
