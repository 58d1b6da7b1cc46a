"""Rates, delays and amounts of memory, as users write and read them, and what they see of a peer's text."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock_rt.errors import ConfigError
from parablock_rt.units import format_bytes, parse_bytes, parse_delay, parse_rate, printable


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("50mbit", 6.25e6),
        (" 1 Gbit ", 1.25e8),
        ("800kbit", 1e5),
        ("0.5mbit", 62500.0),
        ("9600", 1200.0),
        ("8bit", 1.0),
        ("0", 0.0),
        ("none", 0.0),
        ("", 0.0),
        ("unlimited", 0.0),
    ],
)
def test_rates(text: str, bytes_per_s: float) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize("text", ["fast", "-1mbit", "50mb", "mbit", "nan", "inf", "1e400", "50 mbit/s", "50mbitmbit"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as failure:
        parse_rate(text)
    assert str(failure.value) == f"expected a rate such as 50mbit, 1gbit or 800kbit, found {text!r}"


@pytest.mark.parametrize(("text", "seconds"), [("40ms", 0.04), ("0.5s", 0.5), ("2", 2.0), (" 0MS ", 0.0), ("5s", 5.0)])
def test_delays(text: str, seconds: float) -> None:
    assert parse_delay(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1ms", "61s", "nan", "40 m", "ms", "1h"])
def test_what_is_no_delay_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as failure:
        parse_delay(text)
    assert str(failure.value) == f"expected a delay of at most 5s, such as 40ms or 0.5s, found {text!r}"


@given(st.text())
def test_any_text_is_a_number_in_its_bounds_or_refused(text: str) -> None:
    for parse, largest in ((parse_rate, math.inf), (parse_delay, 60.0), (parse_bytes, math.inf)):
        with contextlib.suppress(ConfigError):
            value = parse(text)
            assert 0 <= value <= largest
            assert math.isfinite(value)


@given(st.floats(min_value=0, max_value=1e12), st.sampled_from(["kbit", "mbit", "gbit", "bit", ""]))
def test_a_rate_is_its_number_times_its_unit(number: float, unit: str) -> None:
    scale = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}.get(unit, 1.0)
    assert parse_rate(f"{number!r}{unit}") == number * scale / 8


@pytest.mark.parametrize(
    ("text", "nbytes"), [("8gib", 8 << 30), ("1.5MiB", 3 << 19), ("64 kib", 64 << 10), ("4096", 4096), ("0", 0)]
)
def test_amounts_of_memory_are_read(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "lots", "-1gib", "infgib", "8gb"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected an amount of memory such as 8gib"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (21_670_000_000, "21.67 GB"), (10**6, "1.00 MB")],
)
def test_amounts_of_memory_are_shown_in_decimal_units(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2⁻⁷² of a [b]round[/b]", "2⁻⁷² of a [b]round[/b]"),
        ("\x1b]0;title\x07\x1b[31mred\r\nnext", "?]0;title??[31mred??next"),
        ("\ud800\u202e\x9b", "???"),
        ("a" * 501, "a" * 499 + "…"),
    ],
)
def test_of_a_peer_s_text_a_terminal_gets_what_it_can_print(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(), st.integers(1, 20))
def test_any_text_of_a_peer_is_printed_on_one_line_of_the_length_that_is_asked_for(text: str, most: int) -> None:
    shown = printable(text, most)
    assert shown.isprintable()
    assert len(shown) == min(len(text), most)
