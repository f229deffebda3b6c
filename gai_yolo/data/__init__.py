"""From files on disk to batches; knows nothing of processes: rank and world size arrive as arguments."""
