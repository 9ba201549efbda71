"""Wherein protocols differ."""

from msn_eval.results.protocol_difference import nearest_protocol, protocol_differences


def test_fields_are_named_by_their_path_and_hashes_are_short() -> None:
    first = {"data": {"sha256": "a" * 64}, "limit": None, "same": 1}
    second = {"data": {"sha256": "b" * 64}, "limit": 5, "same": 1, "new": True}

    assert protocol_differences(first, second) == [
        "data.sha256: aaaaaaaaaaaa -> bbbbbbbbbbbb",
        "limit: None -> 5",
        "new: (none) -> True",
    ]


def test_hashes_that_differ_late_differ() -> None:
    assert protocol_differences({"x": "a" * 64}, {"x": "a" * 63 + "b"}) == ["x: aaaaaaaaaaaa -> aaaaaaaaaaaa"]


def test_nearest_has_the_fewest_differences() -> None:
    assert nearest_protocol({"a": 1, "b": 1}, [{"a": 2, "b": 2}, {"a": 1, "b": 3}]) == ["b: 1 -> 3"]
    assert nearest_protocol({"a": 1}, []) == []
