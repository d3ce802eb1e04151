"""Many runs under one command, and what a reader wants to see of them side by side."""
