"""Where the nodes of a job meet: key-value stores, a file or served over TCP, and torchrun's rendezvous on them."""
