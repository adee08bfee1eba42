"""What the gates stand on: the ring, shares in it, and correlated randomness."""
