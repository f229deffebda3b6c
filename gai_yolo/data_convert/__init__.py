"""`gai-yolo data convert` and `gai-yolo data split`: a data set in another format, and a new partition of one into splits."""
