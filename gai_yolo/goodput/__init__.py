"""Where the time goes: what a process writes down, and what the records add up to."""
