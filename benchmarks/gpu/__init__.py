"""The stages of the GPU report."""
