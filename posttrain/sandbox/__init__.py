"""Running untrusted programs contained: no network, no file of the host, bounded time, memory, processes and output."""
