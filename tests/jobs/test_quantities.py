import pytest

from jobs.quantities import count, size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes_are_binary(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1500, "1.5 k"), (2e13, "20.0 T")]
)
def test_counts_are_decimal(number: float, text: str) -> None:
    assert count(number) == text
