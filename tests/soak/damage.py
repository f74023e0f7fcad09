"""Files as a crash, a bad disk or a stranger leaves them: cut, with other bits, pieces moved, repeated or replaced."""

from hypothesis import strategies as st

MARKS = [
    b"",
    b"\0",
    b"\0" * 512,
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n\n",
    b",",
    b'"',
    b"nan",
    b"-inf",
    b"1e999",
    b"9" * 400,
    b"\x80\x81",
    b"<script>alert(1)</script>",
    "größe".encode("latin-1"),
]
"""Bytes that mean something to one of the formats, or to none."""

_places = st.floats(0, 1, exclude_max=True)
_lengths = st.integers(1, 200)


def _at(data, place):
    return int(place * len(data))


def _cut(data, place):
    return data[: _at(data, place)]


def _behead(data, place):
    return data[_at(data, place) :]


def _flip(data, place, bit):
    at = _at(data, place)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] if data else data


def _insert(data, place, mark):
    at = _at(data, place)
    return data[:at] + mark + data[at:]


def _overwrite(data, place, mark):
    at = _at(data, place)
    return data[:at] + mark + data[at + len(mark) :]


def _drop(data, place, length):
    at = _at(data, place)
    return data[:at] + data[at + length :]


def _repeat(data, place, length):
    at = _at(data, place)
    return data[: at + length] + data[at:]


def _swap(data, place, length):
    at = _at(data, place)
    return data[:at] + data[at + length : at + 2 * length] + data[at : at + length] + data[at + 2 * length :]


_steps = st.one_of(
    st.tuples(st.sampled_from([_cut, _behead]), _places),
    st.tuples(st.just(_flip), _places, st.integers(0, 7)),
    st.tuples(st.sampled_from([_insert, _overwrite]), _places, st.sampled_from(MARKS)),
    st.tuples(st.sampled_from([_drop, _repeat, _swap]), _places, _lengths),
)


def damaged(data, steps):
    """A file's bytes after some of :func:`damages`."""
    for step, *arguments in steps:
        data = step(data, *arguments)
    return data


def damages(most=3):
    """Lists of steps that each damage a file in one place."""
    return st.lists(_steps, min_size=1, max_size=most)
