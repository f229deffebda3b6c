"""Looking for objects in pictures: the class `Detector` for programs, and what the command `gai-yolo predict` does."""
