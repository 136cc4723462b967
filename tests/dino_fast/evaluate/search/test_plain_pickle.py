"""Pickles of plain data are read without running anything; all others are refused."""

import collections
import contextlib
import datetime
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_fast.evaluate.search.plain_pickle import NotPlainError, PickledArray, read_plain_pickle

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.integers() | st.binary(), inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=8,
)


@given(PLAIN, st.sampled_from(range(2, pickle.HIGHEST_PROTOCOL + 1)))
def test_plain_data_comes_back(value: Any, protocol: int):
    assert read_plain_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [0, 1])
def test_the_oldest_protocols(protocol: int):
    value = {"imlist": ["a", "b"], "gnd": [{"bbx": (1.5, 2.0, -3e7, 0.0), "easy": [0, True, None, 2**70, -3]}]}
    assert read_plain_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["int64", ">i4", "uint8", "float32", "bool"])
def test_arrays_of_numbers_come_back(protocol: int, dtype: str):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    for given_array in (array, np.asfortranarray(array), array[:, ::-1], array[:0]):
        found = read_plain_pickle(pickle.dumps([given_array, given_array], protocol))[1]
        assert isinstance(found, PickledArray)
        assert found.values.dtype == given_array.dtype
        assert np.array_equal(found.values, given_array)
    assert read_plain_pickle(pickle.dumps({"n": array[1, 1]}, protocol)) == {"n": array[1, 1]}


def test_a_pickle_of_python_2():
    # {'imlist': ['a\xe9'], 'easy': numpy.array([1, 2])}, as Python 2.7 wrote it
    data = (
        b"\x80\x02}q\x00(U\x06imlistq\x01]q\x02U\x02a\xe9q\x03aU\x04easyq\x04cnumpy.core.multiarray\n_reconstruct\n"
        b"q\x05cnumpy\nndarray\nq\x06K\x00\x85q\x07U\x01bq\x08\x87q\tRq\n(K\x01K\x02\x85q\x0bcnumpy\ndtype\nq\x0cU\x02i8"
        b"q\rK\x00K\x01\x87q\x0eRq\x0f(K\x03U\x01<q\x10NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x11b\x89U\x10\x01"
        b"\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00q\x12tq\x13bu."
    )
    found = read_plain_pickle(data)
    assert found["imlist"] == ["aé"]
    assert found["easy"].values.tolist() == [1, 2]


class _Hostile:
    def __init__(self, what: tuple[Any, ...]) -> None:
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return self.what


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_run(protocol: int, tmp_path: Path):
    for harmful in (
        _Hostile((os.system, (f"touch {tmp_path}/ran",))),
        _Hostile((eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",))),
        _Hostile((os.mkdir, (str(tmp_path / "ran"),))),
    ):
        with pytest.raises(NotPlainError, match=r"the name '(posix|builtins|__builtin__)\.\w+'"):
            read_plain_pickle(pickle.dumps({"imlist": [harmful]}, protocol))
    assert not list(tmp_path.iterdir())


def test_more_than_data_is_refused():
    for value in (
        datetime.date(2020, 1, 1), collections.OrderedDict(), {1, 2}, Path("x"), np.array([object()]),
        np.array(["text"]), np.zeros(2, "datetime64[s]"), np.ma.zeros(2), 1j, {(1, 2): 3}, _Hostile((np.load, ("x",))),
    ):  # fmt: skip
        with pytest.raises(NotPlainError):
            read_plain_pickle(pickle.dumps(value, 4))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"x", b"{", b"(.", b"]N.", b"N", b"Nb.", b"(dN.", b"h\x00.", b"a.", b"\x85.", b"Na.", b"}NNs.", b"}(Nu.",
        b"cnumpy\ndtype\n(S'i8'\ntRb.", b"cnumpy\ndtype\n(S'O8'\ntR.", b"c__main__\nx\n.",
        b"X\xff\xff\xff\x7f.", b"\x8b\xff\xff\xff\x7f.", b"Iabc\n.", b"(lp0\ng0\na0", b"cnumpy\nndarray\n)\x81.",
    ],
)  # fmt: skip
def test_damaged_pickles_are_refused(data: bytes):
    with pytest.raises(NotPlainError):
        read_plain_pickle(data)


@given(st.data())
def test_a_changed_pickle_is_read_or_refused(data: st.DataObject):
    content = bytearray(pickle.dumps({"imlist": ["a"], "gnd": [{"easy": np.arange(3), "bbx": [0.5, 1, 2, 3]}]}, 2))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(NotPlainError):
        read_plain_pickle(bytes(content[: data.draw(st.integers(1, len(content)))]))
