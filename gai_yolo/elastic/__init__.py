"""What makes training indifferent to the machines it runs on."""
