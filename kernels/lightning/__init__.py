"""Lightning attention: linear attention with a constant decay per head."""
