"""How the clouds announce that a machine goes away."""
