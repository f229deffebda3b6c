"""The command `gai-yolo`; a module a group of commands."""
