"""Ids of another dtype are told from int32, and records that are no ids are named."""

import numpy as np
import pytest

from deepseek_jax.data.array_records import id_fault
from tests.support.array_records import write_array_record
from tests.support.reading import contents, read, skipping

IDS = [[7, 8, 9], [5], [0, 250, 0, 12], []]


def write(folder, dtype, ids=IDS):
    write_array_record(folder / "ids.array_record", [np.array(record, dtype).tobytes() for record in ids])
    return folder / "ids.array_record"


def test_int32_is_read(tmp_path):
    assert [ids.tolist() for ids in contents(write(tmp_path, "<i4"))] == IDS[:3]
    # zeros in odd places are no proof when there are few, or when another record has others
    assert [ids.tolist() for ids in contents(write(tmp_path, "<i4", [[7, 0, 8, 0]]))] == [[7, 0, 8, 0]]
    ids = [[7, 0, 8, 0, 9, 0, 9, 0], [1, 2]]
    assert [ids.tolist() for ids in contents(write(tmp_path, "<i4", ids))] == ids
    assert len(contents(write(tmp_path, "<i4", [[0] * 20, [1]]))) == 2


@pytest.mark.parametrize("ids", [IDS, [[i] for i in range(5)], [[3, 4, 5, 6]]])
def test_int64_is_refused_with_the_remedy(tmp_path, ids):
    """Case 16: every second id was 0, and training went on."""
    with pytest.raises(ValueError, match=r"has ids of 8 bytes \(int64\), not int32; write np.asarray\(ids, '<i4'\)"):
        read(write(tmp_path, "<i8", ids))
    texts, messages = skipping(tmp_path / "ids.array_record")
    assert texts == [] and len(messages) == 1


def test_bytes_that_are_no_ids(tmp_path):
    path = write(tmp_path, "<u2")
    with pytest.raises(ValueError, match=r"record 0 has 6 bytes, .* int32 token ids; write np.asarray"):
        read(path)
    odd = tmp_path / "caf\udce9.array_record"
    path.rename(odd)
    with pytest.raises(ValueError, match=r"caf\\udce9.array_record is not an .* its name is not UTF-8"):
        read(odd)


@pytest.mark.parametrize(
    ("dtype", "ids", "remedy"),
    [
        (">i4", [1, 2, 3], "its bytes look like big-endian int32: write np.asarray"),
        ("<u2", [1, 2, 3, 4], "its bytes look like uint16: write np.asarray"),
        ("<i4", [1, 262], "has token id 262 and the vocabulary ends at 261; set data.tokenizer"),
        ("<i4", [1, -1], "has token id -1 "),
        ("<i4", [1, 2**31 - 1], "set data.tokenizer to the tokenizer.json that made these ids"),
    ],
)
def test_ids_beyond_the_vocabulary_and_the_remedy(dtype, ids, remedy):
    assert remedy in id_fault(np.frombuffer(np.array(ids, dtype).tobytes(), "<i4"), 262)
    assert id_fault(np.array([0, 261], np.int32), 262) is None
    assert id_fault(np.array([], np.int32), 262) is None
