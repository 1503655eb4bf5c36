"""What runs in the sandbox's own processes: standard library alone, started with `python -I -S`."""
