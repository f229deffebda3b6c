"""The command `gai-yolo`."""


def main() -> int:
    """Not there yet."""
    return 2
