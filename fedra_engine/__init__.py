"""Federated LoRA tuning of transformer foundation models by many heterogeneous clients."""
