"""Scaling studies: what a round costs as the number of clients, and of processes, grows."""
