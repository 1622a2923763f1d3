import types

import numpy as np
import pytest

from kd_jax.config.data import Transfer
from kd_jax.config.settings import block, read
from kd_jax.data.transfer_set import PERIOD, TransferSet
from kd_jax.types import UserError


def store(name, language, kind, rows, maskable_per_row=100.0, texts_per_row=5, source=None, cut=0):
    return types.SimpleNamespace(
        name=name, language=language, kind=kind, num_rows=rows, length=128, source=source or name,
        fingerprint=f"f-{name}", maskable=rows * maskable_per_row, texts=rows * texts_per_row, cut=cut,
    )  # fmt: skip


def transfer(**changes):
    return read(Transfer, block(Transfer, **({"language_mix": "own"} | changes)), "transfer")


def make(stores, seed=0, weights=None, **changes):
    weights = weights or {s.source: 1.0 for s in stores}
    return TransferSet(stores, transfer=transfer(**changes), seed=seed, weights=weights)


def seven_small_sources():
    """One generic source of 97.2 % and seven task sources of 0.4 % of the rows each."""
    stores = [store("web", "en", "generic", 5000)]
    stores += [store(f"tiny{i}", "en", "task", 3 + i) for i in range(7)]
    return make(stores, task_share=0.028)


def prefix_counts(mixed, rows):
    source = mixed.locate(np.arange(rows))[0]
    return np.cumsum(source[:, None] == np.arange(len(mixed.stores)), axis=0)


def test_shares_hold_within_one_row_at_every_moment():
    mixed = seven_small_sources()
    np.testing.assert_allclose(mixed.row_shares, [0.972] + [0.004] * 7, atol=1 / PERIOD)
    counts = prefix_counts(mixed, PERIOD + 5000)
    i = np.arange(1, len(counts) + 1)[:, None]
    assert np.abs(counts - i * mixed.row_shares).max() < 1


@pytest.mark.parametrize("seed", range(5))
def test_shares_hold_for_random_mixtures(seed):
    random = np.random.default_rng(seed)
    stores = [store(f"s{i}", "en", "generic", int(random.integers(1, 300))) for i in range(random.integers(1, 12))]
    weights = {s.source: float(w) for s, w in zip(stores, random.dirichlet(np.full(len(stores), 0.5)) + 1e-4)}
    mixed = make(stores, weights=weights, task_share=0.0)
    counts = prefix_counts(mixed, PERIOD)
    i = np.arange(1, PERIOD + 1)[:, None]
    assert np.abs(counts - i * mixed.row_shares).max() < 1
    np.testing.assert_array_equal(counts[-1], mixed.row_shares * PERIOD)


@pytest.mark.parametrize("task_share", [0.1, 0.5, 0.7])
def test_token_shares_over_a_run_with_different_tokens_per_row(task_share):
    stores = [
        store("web", "de", "generic", 4000, maskable_per_row=120),
        store("nlu", "de", "task", 300, maskable_per_row=17.5),
    ]
    mixed = make(stores, task_share=task_share)
    source = mixed.locate(np.arange(20000))[0]
    tokens = np.where(source == 1, 17.5, 120.0)
    assert tokens[source == 1].sum() / tokens.sum() == pytest.approx(task_share, rel=0.01)
    described = mixed.describe(20000)
    assert described["kinds"]["task"]["tokens_share"] == pytest.approx(task_share, rel=0.01)
    assert described["stores"]["nlu"]["rows"] == np.count_nonzero(source == 1)


def test_shares_may_be_meant_in_utterances():
    stores = [store("web", "de", "generic", 4000, texts_per_row=2), store("nlu", "de", "task", 300, texts_per_row=10)]
    mixed = make(stores, task_share=0.75, unit="utterances")
    # 3 utterances in 4 from rows of 10, 1 in 4 from rows of 2: 0.075 to 0.125 rows.
    np.testing.assert_allclose(mixed.row_shares, [0.625, 0.375], atol=1e-9)
    assert mixed.describe(1000)["kinds"]["task"]["utterances_share"] == pytest.approx(0.75)


def test_every_row_comes_once_an_epoch_in_a_new_order():
    mixed = make([store("web", "en", "generic", 37), store("nlu", "en", "task", 11)], task_share=0.25)
    source, epoch, row = mixed.locate(np.arange(2000))
    for number, rows in ((0, 37), (1, 11)):
        mine = source == number
        np.testing.assert_array_equal(epoch[mine], np.arange(mine.sum()) // rows)
        orders = [row[mine & (epoch == e)] for e in range(epoch[mine].max())]
        for order in orders:
            np.testing.assert_array_equal(np.sort(order), np.arange(rows))
        assert any(not np.array_equal(orders[0], order) for order in orders[1:])


def test_does_not_depend_on_how_it_is_asked():
    mixed = seven_small_sources()
    index = np.random.default_rng(0).integers(0, 2**33, 500)
    together = np.stack(mixed.locate(index))
    one_by_one = np.stack([np.stack(mixed.locate(index[i : i + 1]))[:, 0] for i in range(500)], 1)
    np.testing.assert_array_equal(together, one_by_one)
    np.testing.assert_array_equal(together[:, ::-1], np.stack(mixed.locate(index[::-1])))


def test_exact_for_very_large_indices():
    mixed = seven_small_sources()
    quotas = [round(share * PERIOD) for share in mixed.row_shares]
    first = mixed.locate(np.arange(PERIOD))[0].tolist()
    for index in (2**40 - 1, 2**40 - 65537, 2**35 + 12345, PERIOD - 1, PERIOD):
        source, epoch, row = (int(part[0]) for part in mixed.locate(np.array([index])))
        period, slot = divmod(index, PERIOD)
        rank = period * quotas[source] + first[:slot].count(source)
        assert source == first[slot] and epoch == rank // mixed.stores[source].num_rows
        assert 0 <= row < mixed.stores[source].num_rows


def test_seeds_differ_in_order_but_not_in_shares():
    stores = [store("web", "en", "generic", 1000), store("nlu", "en", "task", 50)]
    zero, one = make(stores, seed=0), make(stores, seed=1)
    index = np.arange(1000)
    np.testing.assert_array_equal(zero.locate(index)[0], one.locate(index)[0])
    assert np.mean(zero.locate(index)[2] == one.locate(index)[2]) < 0.1
    assert zero.fingerprint != one.fingerprint and zero.fingerprint == make(stores, seed=0).fingerprint


def two_kinds():
    return [
        store("web-de", "de", "generic", 9000, source="web"), store("web-en", "en", "generic", 1000, source="web"),
        store("nlu-de-DE", "de-DE", "task", 100, source="nlu"), store("nlu-en-US", "en-US", "task", 300, source="nlu"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mix", "temperature", "expected"),
    [
        ("task", 1.0, [0.15, 0.45, 0.1, 0.3]),
        ("generic", 1.0, [0.54, 0.06, 0.36, 0.04]),
        ("own", 1.0, [0.54, 0.06, 0.1, 0.3]),
        ("own", 0.5, [0.45, 0.15, 0.4 / (1 + 3**0.5), 0.4 * 3**0.5 / (1 + 3**0.5)]),
        ("task", 0.0, [0.3, 0.3, 0.2, 0.2]),
        ("uniform", 1.0, [0.3, 0.3, 0.2, 0.2]),
    ],
)
def test_language_mix(mix, temperature, expected):
    mixed = make(two_kinds(), task_share=0.4, language_mix=mix, language_temperature=temperature)
    np.testing.assert_allclose(mixed.row_shares, expected, atol=1 / PERIOD)


def with_selected():
    """`two_kinds`, and a small selection from the generic text."""
    return [
        *two_kinds(), store("web.selected-de", "de", "selected", 60, source="web"),
        store("web.selected-en", "en", "selected", 40, source="web"),
    ]  # fmt: skip


@pytest.mark.parametrize("mix", ["task", "generic", "own", "uniform"])
@pytest.mark.parametrize("kind", ["generic", "selected"])
def test_one_kind_of_store_fills_the_generic_share(kind, mix):
    settings = {"task_share": 0.4, "language_mix": mix}
    mixed = make(with_selected(), generic=kind, **settings)
    # The other kind might as well not be there.
    chosen = [s for s in with_selected() if s.kind in (kind, "task")]
    alone = make(
        [types.SimpleNamespace(**{**vars(s), "kind": s.kind.replace("selected", "generic")}) for s in chosen],
        **settings,
    )
    used = [mixed.stores.index(s) for s in chosen]
    np.testing.assert_array_equal(mixed.row_shares[used], alone.row_shares)
    assert mixed.row_shares[used].sum() == 1 and len(mixed.stores) == 6
    located, expected = mixed.locate(np.arange(3000)), alone.locate(np.arange(3000))
    np.testing.assert_array_equal(located[0], np.array(used)[expected[0]])
    np.testing.assert_array_equal(located[2], expected[2])
    described = mixed.describe(3000)
    assert described["generic"] == kind
    assert {**described, "generic": "generic"} == alone.describe(3000)
    assert list(described["stores"]) == [s.name for s in chosen]


def test_selected_text_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"transfer\.generic: 'selected' needs selected text, .* config\.select\.share"):
        make(two_kinds(), generic="selected", task_share=0.0)
    with pytest.raises(UserError, match="needs selected text in 'en'"):
        make(with_selected()[:-1], generic="selected", language_mix="task")
    with pytest.raises(UserError, match=r"transfer\.generic: 'chosen' is not known"):
        make(two_kinds(), generic="chosen")


def test_sources_of_a_language_follow_their_weights_and_locales_their_tokens():
    stores = [
        store("web-zh", "zh", "generic", 500, source="web"), store("news-zh", "zh", "generic", 5, source="news"),
        store("nlu-zh-CN", "zh-CN", "task", 30, source="nlu"), store("nlu-zh-TW", "zh-TW", "task", 10, source="nlu"),
    ]  # fmt: skip
    mixed = make(stores, weights={"web": 3.0, "news": 1.0, "nlu": 0.2}, task_share=0.5, language_mix="task")
    np.testing.assert_allclose(mixed.row_shares, [0.375, 0.125, 0.375, 0.125], atol=1 / PERIOD)


def test_ends_of_the_scale_leave_the_other_kind_out():
    for share, kind in ((0.0, "generic"), (1.0, "task")):
        mixed = make(two_kinds(), task_share=share, language_mix="task")
        source = mixed.locate(np.arange(5000))[0]
        assert {mixed.stores[i].kind for i in np.unique(source)} == {kind}
        np.testing.assert_allclose(mixed.describe(PERIOD)["kinds"][kind]["tokens_share"], 1.0)


def test_describe_gives_the_share_of_texts_that_were_cut():
    stores = [store("a", "en", "generic", 100, cut=50), store("b", "en", "generic", 300), store("c", "en", "task", 10)]
    described = make(stores, task_share=0.5, weights={"a": 0.5, "b": 0.5, "c": 1.0}).describe(1000)
    drawn = described["stores"]["a"]["utterances"], described["stores"]["b"]["utterances"]
    assert described["stores"]["a"]["cut_share"] == pytest.approx(0.1)
    assert described["kinds"]["generic"]["cut_share"] == pytest.approx(0.1 * drawn[0] / sum(drawn))
    assert described["kinds"]["task"]["cut_share"] == 0
    stores[1].cut = None  # as in a store that does not record it
    described = make(stores, task_share=0.5, weights={"a": 0.5, "b": 0.5, "c": 1.0}).describe(1000)
    assert "cut_share" in described["stores"]["a"] and "cut_share" not in described["kinds"]["generic"]


def test_describe_counts_epochs_and_unique_tokens():
    mixed = make([store("web", "en", "generic", 1000), store("nlu", "en", "task", 50)], task_share=0.5)
    described = mixed.describe(1000)
    assert described["stores"]["nlu"]["epochs"] == 10 and described["stores"]["web"]["epochs"] == 0.5
    assert (
        described["stores"]["nlu"]["unique_tokens"] == 5000 and described["kinds"]["generic"]["unique_tokens"] == 50000
    )
    assert described["stores"]["nlu"]["tokens"] == 50000 and described["kinds"]["task"]["unique_utterances"] == 250


def test_a_limit_of_task_texts_keeps_the_shares_and_takes_the_same_rows_for_all_seeds():
    stores = [store("web", "en", "generic", 200), store("en", "en", "task", 100), store("de", "de", "task", 10)]

    def rows_of(limit, seed=0):
        mixed = make(stores, seed=seed, task_share=0.5, task_texts=limit)
        source, _, row = mixed.locate(np.arange(2000))
        return mixed, {number: row[source == number] for number in range(3)}

    everything, all_rows = rows_of(0)
    some, some_rows = rows_of(101)  # texts of 5 per row: 20 rows
    few, few_rows = rows_of(1)
    np.testing.assert_array_equal(some.row_shares, everything.row_shares)
    assert [len(set(rows.tolist())) for rows in some_rows.values()] == [200, 20, 10]
    assert [len(set(rows.tolist())) for rows in few_rows.values()] == [200, 1, 1]
    for number in (1, 2):
        assert set(few_rows[number].tolist()) <= set(some_rows[number].tolist()) <= set(all_rows[number].tolist())
        other_order = rows_of(101, seed=1)[1][number]
        assert other_order.tolist() != some_rows[number].tolist()
        assert set(other_order.tolist()) == set(some_rows[number].tolist())
    # Each epoch draws every row used once.
    first = some_rows[1][:20]
    assert len(set(first.tolist())) == 20 and first.tolist() != some_rows[1][20:40].tolist()
    np.testing.assert_array_equal(some_rows[0], all_rows[0])
    assert len({everything.fingerprint, some.fingerprint, few.fingerprint}) == 3
    assert make(stores, task_share=0.5, task_texts=10_000).fingerprint == everything.fingerprint


def test_describe_counts_what_a_limit_of_task_texts_leaves():
    stores = [store("web", "en", "generic", 200), store("en", "en", "task", 100, cut=40)]
    task = make(stores, task_share=0.5, task_texts=100).describe(400)["kinds"]["task"]
    assert task["unique_utterances"] == 100 and task["unique_tokens"] == 2000
    assert task["epochs"] == 10 and task["tokens"] == 20_000 and task["utterances"] == 1000
    assert task["cut_share"] == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_share": 1.5}, "transfer.task_share: 1.5 is outside"),
        ({"task_share": float("nan")}, "transfer.task_share"),
        ({"unit": "words"}, "transfer.unit"),
        ({"language_mix": "both"}, "transfer.language_mix"),
        ({"language_temperature": -1.0}, "transfer.language_temperature"),
        ({"task_texts": -1}, "transfer.task_texts: -1 is negative"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(two_kinds(), **changes)


def test_missing_text_is_named():
    with pytest.raises(UserError, match="needs generic text in 'en'"):
        make([s for s in two_kinds() if s.name != "web-en"], language_mix="task")
    with pytest.raises(UserError, match="needs task text in 'fr'"):
        make([*two_kinds(), store("web-fr", "fr", "generic", 10, source="web")], language_mix="uniform")
    with pytest.raises(UserError, match="needs task text, but"):
        make(two_kinds()[:2])
    with pytest.raises(UserError, match="follows the languages of task text"):
        make(two_kinds()[:2], task_share=0.0, language_mix="task")
    with pytest.raises(UserError, match="web-en would get"):
        stores = two_kinds()
        stores[1] = store("web-en", "en", "generic", 1, maskable_per_row=1e6, source="web")
        stores[0] = store("web-de", "de", "generic", 10**9, source="web")
        make(stores)
    with pytest.raises(UserError, match="has no 'nlu'"):
        make(two_kinds(), weights={"web": 1.0})
