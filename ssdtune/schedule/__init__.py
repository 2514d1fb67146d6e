"""What is where, and when: plans and traces. Names, bytes and FLOPs; no tensors, files or clocks."""
