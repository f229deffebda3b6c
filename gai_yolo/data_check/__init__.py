"""`gai-yolo data check`: reads a data set as training does, and shows what is in it and what is wrong with it."""
