"""Both ends of a weight transfer: NCCL itself, and where ranks meet. No torch."""
