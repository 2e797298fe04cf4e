"""The pytest-benchmark suite that `retinar bench` runs."""
