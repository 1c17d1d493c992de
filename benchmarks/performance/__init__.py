"""Speed and memory beside the peers, one module of `rows` a row of the table: `python -m benchmarks.performance`."""
