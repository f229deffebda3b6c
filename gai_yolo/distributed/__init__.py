"""This process among the others: groups, networks, sums that do not depend on who adds up what."""
