import numpy as np
import pytest

from kd_jax.data.packing import BestFit, maskable, pack_stream, positions, runs

CLS, SEP, PAD = 1, 2, 0


def random_texts(count, longest, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(5, 50000, random.integers(0, longest)).astype(np.int32) for _ in range(count)]


def segments_of(tokens, segment_ids):
    """Every segment's tokens, read one by one."""
    found = []
    for row, ids in zip(tokens, segment_ids):
        for number in range(1, ids.max() + 1):
            columns = np.flatnonzero(ids == number)
            np.testing.assert_array_equal(columns, np.arange(columns[0], columns[0] + len(columns)))
            found.append(tuple(row[columns].tolist()))
    return found


def pack(texts, length, open_rows=8, chunk=10):
    chunks = [texts[i : i + chunk] for i in range(0, len(texts), chunk)]
    blocks = list(pack_stream(chunks, length, CLS, SEP, PAD, open_rows))
    return np.concatenate([b[0] for b in blocks]), np.concatenate([b[1] for b in blocks])


def test_hand_worked_rows():
    texts = [np.array([7, 8, 9]), np.array([], np.int32), np.array([10]), np.array([11, 12])]
    tokens, segment_ids = pack(texts, length=8)
    np.testing.assert_array_equal(tokens, [[1, 7, 8, 9, 2, 1, 10, 2], [1, 11, 12, 2, 0, 0, 0, 0]])
    np.testing.assert_array_equal(segment_ids, [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0, 0]])


def test_runs():
    np.testing.assert_array_equal(runs(np.array([5, 0, 9]), np.array([3, 0, 2])), [5, 6, 7, 9, 10])


@pytest.mark.parametrize("open_rows", [1, 3, 64])
def test_no_text_is_lost_and_long_ones_are_split(open_rows):
    length, texts = 24, random_texts(500, 60)
    expected = []
    for text in texts:
        for start in range(0, len(text), length - 2):
            expected.append((CLS, *text[start : start + length - 2].tolist(), SEP))
    tokens, segment_ids = pack(texts, length, open_rows)
    assert sorted(segments_of(tokens, segment_ids)) == sorted(expected)
    assert np.all(tokens[segment_ids == 0] == PAD)


def test_rows_do_not_depend_on_the_chunks():
    texts = random_texts(300, 30)
    once = pack(texts, 20, chunk=300)
    for chunk in (1, 7, 64):
        again = pack(texts, 20, chunk=chunk)
        np.testing.assert_array_equal(once[0], again[0])
        np.testing.assert_array_equal(once[1], again[1])


def test_rows_are_full():
    texts = random_texts(3000, 40)
    _, segment_ids = pack(texts, 64, open_rows=64, chunk=256)
    assert np.mean(segment_ids > 0) > 0.97


def test_full_rows_close_early_so_memory_stays_bounded():
    fit = BestFit(10, open_rows=2, max_segments=10)
    rows, columns, numbers, closed = fit.place([6, 7, 5, 4])
    # Rows 0, 1 and 2 open with room 4, 3 and 5; three are one too many, so the fullest (1) closes; 4 fits row 0 best.
    assert (rows, columns, numbers) == ([0, 1, 2, 0], [0, 0, 0, 6], [1, 1, 1, 2])
    assert closed == [1, 0]


def test_a_row_takes_no_more_than_max_segments():
    fit = BestFit(30, open_rows=9, max_segments=2)
    rows, _, numbers, closed = fit.place([3, 3, 3])
    assert (rows, numbers, closed) == ([0, 0, 1], [1, 2, 1], [0])


def test_positions_restart_in_each_segment():
    segment_ids = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2], [0] * 8])
    expected = [[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6], [0] * 8]
    np.testing.assert_array_equal(positions(segment_ids), expected)


def test_maskable_leaves_out_special_tokens_and_padding():
    tokens, segment_ids = np.array([[1, 9, 3, 2, 9]]), np.array([[1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(maskable(tokens, segment_ids, (0, 1, 2, 3)), [[False, True, False, False, False]])
