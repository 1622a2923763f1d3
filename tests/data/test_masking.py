import numpy as np
import pytest

from kd_jax.config.data import Masking
from kd_jax.data.masking import mask_rows, num_slots, row_keys
from kd_jax.data.packing import maskable

PAD, CLS, SEP, UNK, MASK = range(5)
SPECIAL = (PAD, CLS, SEP, UNK, MASK)
VOCABULARY = 1000


def packed_rows(sizes_of_rows, length, seed=0):
    """Rows of [cls] pieces [sep] segments with the given piece counts."""
    random = np.random.default_rng(seed)
    tokens = np.full((len(sizes_of_rows), length), PAD, np.int32)
    segment_ids = np.zeros((len(sizes_of_rows), length), np.int32)
    for row, sizes in enumerate(sizes_of_rows):
        column = 0
        for number, size in enumerate(sizes, 1):
            pieces = random.integers(5, VOCABULARY, size)
            tokens[row, column : column + size + 2] = [CLS, *pieces, SEP]
            segment_ids[row, column : column + size + 2] = number
            column += size + 2
    return tokens, segment_ids


def masked(tokens, segment_ids, rows=None, epoch=0, seed=0, rate=0.15, **changes):
    rows = np.arange(len(tokens)) if rows is None else rows
    return mask_rows(
        tokens,
        segment_ids,
        keys=row_keys(seed, "store", rows, np.full(len(rows), epoch)),
        slots=num_slots(tokens.shape[1], rate),
        masking=Masking(rate=rate, **changes),
        mask_id=MASK,
        special_ids=SPECIAL,
        random_ids=np.arange(5, VOCABULARY, dtype=np.int32),
    )


def many_rows(count=300, length=64, seed=0):
    random = np.random.default_rng(seed)
    shapes = []
    for _ in range(count):
        sizes, left = [], length
        while left >= 3:
            size = int(min(random.integers(1, 25), left - 2))
            sizes.append(size)
            left -= size + 2
        shapes.append(sizes)
    return packed_rows(shapes, length)


def test_slots_hold_the_share_of_a_full_row():
    assert (num_slots(128, 0.15), num_slots(64, 0.15), num_slots(16, 0.15), num_slots(8, 0.01)) == (19, 10, 3, 1)


def test_counts_positions_and_targets():
    tokens, segment_ids = many_rows()
    corrupted, positions, targets, weights = masked(tokens, segment_ids)
    allowed = maskable(tokens, segment_ids, SPECIAL)
    # The rule, row by row: round(rate * maskable), at least 1.
    expected = [max(1, int(np.floor(0.15 * row.sum() + 0.5))) for row in allowed]
    np.testing.assert_array_equal(weights.sum(axis=1), expected)
    for row in range(len(tokens)):
        used = positions[row, weights[row] > 0]
        assert np.all(np.diff(used) > 0) and allowed[row, used].all()
        np.testing.assert_array_equal(targets[row, weights[row] > 0], tokens[row, used])
        assert not positions[row, weights[row] == 0].any() and not targets[row, weights[row] == 0].any()
        assert np.all(np.diff(weights[row]) <= 0)
        elsewhere = np.delete(np.arange(tokens.shape[1]), used)
        np.testing.assert_array_equal(corrupted[row, elsewhere], tokens[row, elsewhere])
    assert corrupted.dtype == positions.dtype == targets.dtype == np.int32 and weights.dtype == np.float32


@pytest.mark.parametrize("rate", [0.15, 1.0])
def test_never_all_of_an_utterance(rate):
    tokens, segment_ids = many_rows()
    _, positions, _, weights = masked(tokens, segment_ids, rate=rate)
    is_masked = np.zeros(tokens.shape, bool)
    rows, slots = np.nonzero(weights)
    is_masked[rows, positions[rows, slots]] = True
    kept = maskable(tokens, segment_ids, SPECIAL) & ~is_masked
    for row in range(len(tokens)):
        for number in range(1, segment_ids[row].max() + 1):
            count = np.count_nonzero(kept[row] & (segment_ids[row] == number))
            # At rate 1 everything but the exempt piece is masked.
            assert count == 1 if rate == 1.0 else count >= 1


def test_rows_without_a_choice():
    tokens, segment_ids = packed_rows([[1, 1], [], [2], [62]], 64)
    tokens[3, 1:63] = UNK
    _, _, _, weights = masked(tokens, segment_ids)
    # One-piece texts, an empty row and a row of special tokens have no mask; two pieces have one.
    np.testing.assert_array_equal(weights.sum(axis=1), [0, 0, 1, 0])


def test_a_full_row_uses_all_slots():
    tokens, segment_ids = packed_rows([[126]] * 5, 128)
    assert masked(tokens, segment_ids)[3].all()


def test_each_maskable_position_is_equally_likely():
    tokens, segment_ids = packed_rows([[20, 20, 16]], 64)
    repeats = 4000
    _, positions, _, weights = masked(np.repeat(tokens, repeats, 0), np.repeat(segment_ids, repeats, 0))
    counts = np.bincount(positions[weights > 0], minlength=64)[maskable(tokens, segment_ids, SPECIAL)[0]]
    mean = weights.sum() / 56
    assert np.all(np.abs(counts - mean) < 5 * np.sqrt(mean) + 0.02 * mean)


def test_replacements_follow_their_shares():
    tokens, segment_ids = packed_rows([[62]] * 4000, 64)
    corrupted, positions, targets, weights = masked(tokens, segment_ids)
    new = np.take_along_axis(corrupted, positions, 1)[weights > 0]
    old = targets[weights > 0]
    deviation = 5 * np.sqrt(0.1 * 0.9 / len(old))
    assert np.mean(new == MASK) == pytest.approx(0.8, abs=2 * deviation)
    # A random piece equals the old one once in 995 draws.
    assert np.mean(new == old) == pytest.approx(0.1 + 0.1 / 995, abs=deviation)
    random_pieces = new[(new != MASK) & (new != old)]
    assert random_pieces.min() >= 5 and len(np.unique(random_pieces)) > 900


def test_shares_of_zero_and_one():
    tokens, segment_ids = many_rows(50)
    only_mask = masked(tokens, segment_ids, mask_share=1.0, random_share=0.0)
    assert np.all(np.take_along_axis(only_mask[0], only_mask[1], 1)[only_mask[3] > 0] == MASK)
    kept = masked(tokens, segment_ids, mask_share=0.0, random_share=0.0)
    np.testing.assert_array_equal(kept[0], tokens)


def test_masks_depend_on_seed_store_row_and_epoch_alone():
    tokens, segment_ids = many_rows(40)
    whole = masked(tokens, segment_ids)
    order = np.random.default_rng(0).permutation(40)[:17]
    part = masked(tokens[order], segment_ids[order], rows=order)
    for a, b in zip(whole, part):
        np.testing.assert_array_equal(a[order], b)
    for other in (masked(tokens, segment_ids, epoch=1), masked(tokens, segment_ids, seed=1)):
        assert np.mean(np.all(whole[1] == other[1], axis=1)) < 0.1
    same = row_keys(0, "store", np.arange(5), np.zeros(5, int))
    assert not np.any(same == row_keys(0, "other", np.arange(5), np.zeros(5, int)))


# Positions, counts and corrupted tokens at the positions (unused slots read column 0, the [cls] token).
GOLDEN = (
    [[1, 5, 13, 14, 0], [4, 6, 9, 14, 0]],
    [4.0, 4.0],
    [[4, 624, 4, 4, 1], [553, 4, 4, 43, 1]],
)


def test_golden():
    tokens, segment_ids = packed_rows([[5, 7], [14]], 16)
    tokens = np.where(tokens >= 5, 100 + np.arange(16), tokens)
    corrupted, positions, _, weights = masked(tokens, segment_ids, rate=0.3)
    got = (positions.tolist(), weights.sum(axis=1).tolist(), np.take_along_axis(corrupted, positions, 1).tolist())
    assert got == GOLDEN, "if you meant to change the masks, all cached predictions and running studies become invalid"
