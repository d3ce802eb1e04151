"""What a training step asks of a GPU: bytes, FLOPs and launches, counted op by op on tensors without values."""
