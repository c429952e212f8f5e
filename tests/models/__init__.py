"""Models and text for tests and benchmarks, none of them downloaded."""
