"""What the outside world tells a job, and who looks after the training thread."""
