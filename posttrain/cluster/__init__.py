"""Ray: starting and stopping it, and what its processes run under."""
