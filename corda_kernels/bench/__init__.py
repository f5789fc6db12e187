"""Benchmarks: what `corda-kernels bench` and the suites in benches/ run."""
