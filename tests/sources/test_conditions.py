import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlatent.sources.conditions import condition_columns, condition_remarks, condition_values, parse_conditions
from fastlatent.sources.items import Column

DEFAULT = (("temperature", 1), ("wind", 3), ("wind_mag", 1))


def test_parse():
    assert parse_conditions("temperature:1,wind:3,wind_mag:1") == DEFAULT
    assert parse_conditions(" temperature : 1 , wind:3,wind_mag:1") == DEFAULT
    assert parse_conditions("none") == parse_conditions("") == parse_conditions("  ") == ()


@pytest.mark.parametrize("text", ["wind", "wind:", ":3", "wind:0", "wind:-1", "wind:1.5", "wind:x", "a:1,,b:1", "a:1,"])
def test_what_is_no_condition(text):
    with pytest.raises(ValueError, match="not name:count"):
        parse_conditions(text)


def test_a_name_twice():
    with pytest.raises(ValueError, match="'a' occurs twice"):
        parse_conditions("a:1,b:1,a:2")


def test_columns():
    assert condition_columns(DEFAULT) == (Column("condition", "F32", (5,)), Column("condition_present", "F32", (3,)))
    assert condition_columns(()) == ()
    assert condition_values((), {"a": 1}) == {}


@pytest.mark.parametrize(
    "metadata, vector, present",
    [
        ({"temperature": 0.2, "wind": [3, 0, 4], "wind_mag": 7}, [0.2, 3, 0, 4, 7], [1, 1, 1]),
        ({"temperature": 0.2, "wind": [3, 0, 4]}, [0.2, 3, 0, 4, 5], [1, 1, 1]),  # the norm of wind
        ({"temperature": 0, "wind": [0, 0, 0], "wind_mag": 0}, [0, 0, 0, 0, 0], [1, 1, 1]),  # zeros that are there
        ({}, [0, 0, 0, 0, 0], [0, 0, 0]),  # zeros that are not
        ({"temperature": None, "wind": None, "wind_mag": None}, [0, 0, 0, 0, 0], [0, 0, 0]),
        ({"wind": [1, 2, 2, 4]}, [0, 1, 2, 2, 5], [0, 1, 1]),  # cut to 3, the norm of all 4
        ({"wind": [3, 4]}, [0, 3, 4, 0, 5], [0, 1, 1]),  # filled up
        ({"wind": []}, [0, 0, 0, 0, 0], [0, 0, 0]),
        ({"wind": -2}, [0, -2, 0, 0, 2], [0, 1, 1]),  # a scalar fills the first place
        ({"temperature": [5, 6]}, [5, 0, 0, 0, 0], [1, 0, 0]),
        ({"temperature": "0.2", "wind": [1, "x", 3]}, [0, 1, 0, 3, 0], [0, 0, 0]),
        ({"temperature": math.nan, "wind": [math.inf, 1, 1]}, [0, 0, 1, 1, 0], [0, 0, 0]),
        ({"temperature": 1e39}, [0, 0, 0, 0, 0], [0, 0, 0]),  # infinite in float32
        ({"temperature": 10**400}, [0, 0, 0, 0, 0], [0, 0, 0]),  # and no float64 either
        ({"temperature": True, "wind": {"x": 1}}, [1, 0, 0, 0, 0], [1, 0, 0]),
        ({"wind": [[1, 2], [3]]}, [0, 0, 0, 0, 0], [0, 0, 0]),
        ({"wind": [1, 2, 3, None]}, [0, 1, 2, 3, 0], [0, 1, 0]),  # the fourth number is in the norm only
    ],
)
def test_values(metadata, vector, present):
    assert condition_values(DEFAULT, metadata) == {"condition": vector, "condition_present": present}


def test_remarks_count_what_is_wrong_with_each_condition():
    wind = {"wind": [1, 2, 2], "wind_mag": 3}
    samples = [
        ("a", {"temperature": 1, "wind": [1, 2, 2]}),  # wind_mag is the norm of wind: not missing
        ("b", {"temperature": "warm", **wind}),
        ("ü", {"temperature": None, "wind": [1, 2], "wind_mag": 1}),
        ("d", {"wind": [1, 2, 3, 4], "wind_mag": 1}),
        ("e", {"temperature": math.nan, "wind": 1, "wind_mag": 1}),
        ("f", {"temperature": [1, 2], "wind": [], "wind_mag": 1}),
        ("g", {"temperature": 1e39, "wind": [1, "x"], "wind_mag": 1}),  # the worse of two problems
    ]
    assert condition_remarks(DEFAULT, samples) == (
        "condition 'temperature': 3 of 7 samples have no finite number there, and count as lacking it; "
        "the first is 'b'",
        "condition 'temperature': 2 of 7 samples lack it; the first is '\\xfc'",
        "condition 'temperature': 1 of 7 samples hold another number of values than 1: cut, or filled with zeros; "
        "the first is 'f'",
        "condition 'wind': 3 of 7 samples hold another number of values than 3: cut, or filled with zeros; "
        "the first is '\\xfc'",
        "condition 'wind': 2 of 7 samples have no finite number there, and count as lacking it; the first is 'f'",
    )
    assert condition_remarks(DEFAULT, [("a", {"temperature": 0, **wind})]) == ()
    assert condition_remarks((), samples) == ()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)


@given(st.fixed_dictionaries({}, optional={"temperature": JSON, "wind": JSON, "wind_mag": JSON}))
def test_any_metadata_give_finite_float32_and_remarks_on_what_is_missing(metadata):
    values = condition_values(DEFAULT, metadata)
    vector, present = values["condition"], values["condition_present"]
    assert len(vector) == 5 and len(present) == 3
    assert set(present) <= {0.0, 1.0}
    assert np.isfinite(np.array(vector, np.float32)).all()
    assert json.loads(json.dumps(values)) == values
    # What counts as missing is remarked on, whatever it is.
    said = condition_remarks(DEFAULT, [("a", metadata)])
    missing = {line.split("'")[1] for line in said if "lack" in line}
    assert missing == {name for (name, _), there in zip(DEFAULT, present, strict=True) if not there}
