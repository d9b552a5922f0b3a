"""Rows and parameters as a served model gets them, whatever a caller makes of them."""

import numpy as np
import pytest

from rlhf_core.errors import DataError
from rlhf_core.serving.rows import text_rows, within

ROWS = [{"prompt": "Where?", "response": "There."}, {"prompt": "When?", "response": ""}]
COLUMNS = {"prompt": ["Where?", "When?"], "response": ["There.", ""]}


@pytest.mark.parametrize("wrap", [list, tuple, np.array, lambda values: [list(values)]])
def test_columns_become_rows_also_where_mlflow_put_each_into_one_cell(wrap) -> None:
    assert text_rows({name: wrap(values) for name, values in COLUMNS.items()}, may_be_empty=["response"]) == ROWS


def test_no_rows_are_no_rows() -> None:
    assert text_rows({"prompt": [], "response": []}) == []
    assert text_rows({"prompt": [[]], "response": [[]]}) == []


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"prompt": [["a", "b"]], "response": [["c"]]},
            "columns of different length: prompt has 2, response has 1. Fix: ",
        ),
        ({"prompt": [["a", None]]}, "row 1: prompt is None, no text. Fix: "),
        ({"prompt": [["a"], ["b"]]}, r"row 0: prompt is \['a'\], no text. Fix: "),
        ({"prompt": [[["a"]]]}, r"row 0: prompt is \['a'\], no text. Fix: "),
        ({"prompt": ["a", float("nan")]}, "row 1: prompt is nan, no text. Fix: "),
    ],
)
def test_what_is_no_table_of_texts_is_refused_by_row_and_column(columns: dict, words: str) -> None:
    with pytest.raises(DataError, match=f"^{words}"):
        text_rows(columns)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -1, 2**63])
def test_a_parameter_that_no_computation_takes_is_refused_by_name(value: float | None) -> None:
    with pytest.raises(DataError, match=r"^parameter seed is .*\. Fix: "):
        within({"seed": value}, "seed", 0, 2**63 - 1)
    assert within({"seed": 7}, "seed", 0, 2**63 - 1) == 7
