"""The parts of the benchmark for GPUs: what must agree, and the comparison with TRL."""
