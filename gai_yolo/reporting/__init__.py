"""What people see: terminal, TensorBoard, pictures."""
