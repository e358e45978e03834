"""The hash that proves a written file: the same for the same values however they lie in memory, another for others."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_carry import random_value

from verl_hpt.data.write import digest_of


def test_any_two_values_have_two_hashes():
    chat = [{"role": "user", "content": "a"}]
    of_one_type = [
        ["", None, "a", "b", "é"],
        [0, None, 1, -1, 2**62],
        [0.0, -0.0, None, float("nan"), 1e300],
        [True, False, None],
        [b"", None, b"\xff"],
        [[], None, [1], [1, 2], [2, 1], [None], [0]],
        [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["", "abc"], ["abc", None], None, []],
        [{"a": 1, "b": None}, {"a": None, "b": 1}, {"a": None, "b": None}, None],
        [chat, chat * 2, [], None, [None], [{"role": "user", "content": None}], [{"role": None, "content": "user"}]],
    ]
    for values in of_one_type:
        kind = pa.array(values).type
        for alone in (True, False):  # beside other values too
            columns = [[value] if alone else [values[0], value, values[-1]] for value in values]
            hashes = {digest_of(pa.table({"x": pa.array(column, kind)})) for column in columns}
            assert len(hashes) == len(values), kind
    first = pa.table({"x": ["a", "b"]})
    assert digest_of(first) != digest_of(pa.table({"x": ["b", "a"]})) != digest_of(pa.table({"y": ["a", "b"]}))


@pytest.mark.parametrize("seed", range(20))
def test_the_hash_is_that_of_the_values_wherever_they_lie(tmp_path, seed):
    draw = random.Random(seed)
    makers = {f"c{i}": random_value(draw, 3) for i in range(4)}
    rows = [{name: make() if draw.random() < 0.8 else None for name, make in makers.items()} for _ in range(60)]
    table = pa.Table.from_pylist(rows)
    digest = digest_of(table)
    assert digest_of(pa.concat_tables([table.slice(0, 7), table.slice(7)])) == digest
    around = pa.concat_tables([table.slice(50), table, table.slice(0, 3)]).combine_chunks()
    assert digest_of(around.slice(10, 60)) == digest
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=60)
    assert digest_of(pq.ParquetFile(tmp_path / "a.parquet").read_row_group(0)) == digest
    for at in draw.sample(range(60), 10):
        for name, make in makers.items():
            other = make()
            if repr(other) != repr(rows[at][name]):
                changed = [{**row, name: other} if i == at else row for i, row in enumerate(rows)]
                assert digest_of(pa.Table.from_pylist(changed, table.schema)) != digest
