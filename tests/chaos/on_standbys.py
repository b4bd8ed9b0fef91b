"""What happens to an application on PostgreSQL with standbys."""

from tests.chaos.scenarios import Scenario

ON_STANDBYS: dict[str, Scenario] = {}
"""Those for a primary with its standbys."""
