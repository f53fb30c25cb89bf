import hashlib

import pytest

from fastlatent.store.provenance import differences, fingerprint


def test_fingerprint_is_the_sha256_of_canonical_json():
    assert fingerprint({"b": 1, "a": "x"}) == hashlib.sha256(b'{"a":"x","b":1}').hexdigest()
    assert fingerprint({"b": 1, "a": "x"}) == fingerprint({"a": "x", "b": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.0})
    assert fingerprint({"a": (1, 2)}) == fingerprint({"a": [1, 2]})


def test_fingerprint_refuses_what_json_cannot_hold():
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        ({}, {}, []),
        ({"a": 1, "b": {"c": [1, 2]}}, {"b": {"c": [1, 2]}, "a": 1}, []),
        ({"size": 256}, {"size": 512}, ["size: 256 (dataset) != 512 (now)"]),
        ({"mirror": True}, {"mirror": "true"}, ['mirror: true (dataset) != "true" (now)']),
        ({"a": 1}, {"a": 1.0}, ["a: 1 (dataset) != 1.0 (now)"]),
        ({"a": None}, {}, ["a: null (dataset) != (absent) (now)"]),
        ({"a": {}}, {"a": {"b": 1}}, ["a: {} (dataset) != (absent) (now)", "a.b: (absent) (dataset) != 1 (now)"]),
        (
            {"vae": {"weights": "a" * 64, "id": "x"}},
            {"vae": {"weights": "b" * 64, "id": "x"}},
            ["vae.weights: aaaaaaaaaaaa… (dataset) != bbbbbbbbbbbb… (now)"],
        ),
        # Two long values that begin alike are shown whole: else the line would say x… != x….
        ({"a": "p" * 40 + "1"}, {"a": "p" * 40 + "2"}, [f"a: {'p' * 40}1 (dataset) != {'p' * 40}2 (now)"]),
    ],
)
def test_differences_name_every_field(ours, theirs, expected):
    assert differences(ours, theirs) == expected
    assert (fingerprint(ours) == fingerprint(theirs)) == (not expected)
