"""Latency, throughput, memory and size of a file on the runtimes that are installed."""
