import pytest

from ssdtune.errors import SSDTuneError
from ssdtune.sizes import format_size, format_size_exactly, parse_size


@pytest.mark.parametrize(
    ("written", "num_bytes"),
    [
        ("300MB", 300 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("21GB", 21 * 10**9),
        ("21 gb", 21 * 10**9),
        (" 2TiB ", 2 * 2**40),
        (".5GB", 5 * 10**8),
        ("7B", 7),
        ("0.1GB", 10**8),
        (10**6, 10**6),
        ("1048576", 2**20),
        (3e8, 300_000_000),
        ("auto", None),
        ("Auto", None),
        (None, None),
    ],
)
def test_sizes_are_read_exactly_with_gb_decimal_and_gib_binary(written, num_bytes):
    assert parse_size(written) == num_bytes


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("54", "54 has no unit; did you mean 54GB?"),
        (54, "54 has no unit; did you mean 54GB?"),
        (0, "less than one byte"),
        ("8000", "8000 has no unit; did you mean 8000MB?"),
        (10**6 - 1, "has no unit"),
        ("8G", "8G is ambiguous; write 8GB or 8GiB"),
        ("8 parsecs", "'parsecs' is not a unit; one of B, KB, MB"),
        ("-3GB", "'-3GB' is not a size; write it like 300MB"),
        (-(10**9), "is not a size"),
        ("0GB", "less than one byte"),
        ("9999999999TB", "more than 1 EiB"),
        ("nanGB", "is not a size"),
        ("1e3GB", "is not a size"),
        (float("nan"), "is not a size"),
        (float("inf"), "is not a size"),
        (True, "is not a size"),
        pytest.param(10**6000, "is not a size", id="6000 digits"),
        pytest.param("9" * 100_000 + "GB", "is not a size", id="long text"),
        ("\x1b[31mGB", r"\x1b"),
        ("", "is not a size"),
    ],
)
def test_what_is_not_a_size_is_refused_with_a_remedy(written, says):
    with pytest.raises(SSDTuneError) as caught:
        parse_size(written)
    message = str(caught.value)
    assert says in message
    assert len(message) < 150
    assert message.isprintable()


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (20_234_567_890, "20.2 GB"),
        (9_996_000, "10.0 MB"),
        (999_960_000, "1.00 GB"),
        (150 * 10**9, "150 GB"),
        (1_200 * 10**12, "1200 TB"),
        (-3 * 10**6, "-3.00 MB"),
    ],
)
def test_sizes_are_shown_with_three_digits(num_bytes, shown):
    assert format_size(num_bytes) == shown


def test_a_shown_size_can_be_read_again_to_three_digits():
    for exponent in range(55):
        num_bytes = 2**exponent + exponent
        assert parse_size(format_size(num_bytes)) == pytest.approx(num_bytes, rel=0.0051)


@pytest.mark.parametrize(
    ("num_bytes", "written"),
    [(21 * 10**9, "21GB"), (3 * 2**29, "1.5GiB"), (2**20 + 1, "1048577B"), (None, "auto")],
)
def test_the_exact_spelling_is_short(num_bytes, written):
    assert format_size_exactly(num_bytes) == written


def test_the_exact_spelling_gives_the_same_bytes_back():
    for num_bytes in [1, 7, 999, 1000, 1024, 2**20 - 1, 2**33 + 1, *(10**n for n in range(17))]:
        assert parse_size(format_size_exactly(num_bytes)) == num_bytes
