"""The transfer set: a pure function from a global row index to (source, epoch, row).

Sources are mixed by a fixed schedule of PERIOD slots that repeats forever. So any row is located without a buffer and
without replaying the rows before it: a run resumes exactly, and the number of hosts changes nothing.
"""

import heapq
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kd_jax.config import require
from kd_jax.config.data import KINDS, Transfer
from kd_jax.data.permutation import counter_keys, name_key, permute
from kd_jax.data.rows import RowStore

# Rows in one period of the schedule. Shares are rounded to whole rows of it, so to 1/65,536.
PERIOD = 2**16


class TransferSet:
    """Mixes row stores in fixed shares: after i rows, a source with share s has been drawn s * i times, within one.

    transfer: config.transfer. weights: config.sources.<name>.weight, by source. seed: orders the rows of each epoch.
    Stores of the generic kind that `transfer.generic` does not name stay in `stores`, with share 0. `task_texts` limits
    the rows that are drawn from a store, not its share. Raises UserError for shares that the stores cannot fill.
    """

    def __init__(self, stores: Sequence[RowStore], *, transfer: Transfer, seed: int, weights: Mapping[str, float]):
        lengths = sorted({store.length for store in stores})
        require(
            len(lengths) > 0, "prepared", "it holds no rows to train on", "name at least one source in config.sources"
        )
        require(len(lengths) == 1, "prepared", f"its rows have several lengths, {lengths}", "run prepare again")
        self.stores = tuple(stores)
        self.generic = transfer.generic  # the kind of store that fills the generic share
        # Shares are meant in tokens or utterances, but rows are drawn, and rows of two stores hold different amounts.
        amounts = [store.maskable if transfer.unit == "tokens" else store.texts for store in stores]
        per_row = np.array([amount / store.num_rows for amount, store in zip(amounts, stores)])
        row_shares = _unit_shares(stores, transfer, weights) / per_row
        self._quotas = _quotas(row_shares / row_shares.sum(), [store.name for store in stores])
        self.row_shares = self._quotas / PERIOD
        self._schedule, self._ranks = _schedule(self._quotas)
        self._all_rows = np.array([store.num_rows for store in stores], np.int64)
        self._num_rows = np.array([_rows_used(store, transfer.task_texts) for store in stores], np.int64)
        # The rows used are the first of an order of the store's own, so a smaller choice is part of a larger one.
        self._limited = self._num_rows < self._all_rows
        self._choices = np.array([name_key("rows used", store.fingerprint) for store in stores], np.uint64)
        # Keyed by the stores' content, so equal rows keep their order when a store is renamed.
        self._keys = np.array([name_key("row order", seed, store.fingerprint) for store in stores], np.uint64)
        mix = [self._quotas.tolist(), self._keys.tolist()]
        mix += [self._num_rows.tolist()] if self._limited.any() else []
        self.fingerprint = f"{name_key(json.dumps(mix)):016x}"

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source int32 [n], epoch int64 [n], row int64 [n]) of global row indices int64 [n], exact up to 2**40.

        `source` counts in the order of `stores`. In each epoch, every row used of a source is drawn once, in an order
        of that epoch's own.
        """
        period, slot = np.divmod(np.asarray(index, np.int64), PERIOD)
        source = self._schedule[slot]
        rank = period * self._quotas[source] + self._ranks[slot]  # earlier draws of this source
        epoch, position = np.divmod(rank, self._num_rows[source])
        row = permute(position, self._num_rows[source], counter_keys(self._keys[source], epoch))
        limited = self._limited[source]
        if limited.any():
            of = source[limited]
            row[limited] = permute(row[limited], self._all_rows[of], self._choices[of])
        return source, epoch, row

    def drawn(self, rows: int) -> np.ndarray:
        """int64 [sources]: how often each source is drawn in the first `rows` rows."""
        periods, rest = divmod(rows, PERIOD)
        return periods * self._quotas + np.bincount(self._schedule[:rest], minlength=len(self.stores))

    def describe(self, rows: int) -> dict[str, Any]:
        """What a run of `rows` rows sees, by store and by kind, and which kind of store fills the generic share.

        For each: rows, maskable tokens and utterances (from the stores' means), their shares, the epochs, the unique
        tokens and utterances (each counted once, however often it repeats), and the share of utterances that are longer
        than a row, if the stores record it.
        """
        drawn = self.drawn(rows)
        epochs = drawn / self._num_rows
        used = self._num_rows / self._all_rows
        tokens, utterances = (
            np.array([getattr(store, name) for store in self.stores]) * used for name in ("maskable", "texts")
        )
        amounts = {
            "rows": drawn.astype(np.float64),
            "tokens": epochs * tokens,
            "utterances": epochs * utterances,
            "unique_tokens": np.minimum(epochs, 1) * tokens,
            "unique_utterances": np.minimum(epochs, 1) * utterances,
        }

        def entry(members: np.ndarray) -> dict[str, float]:
            result: dict[str, float] = {name: round(float(values[members].sum())) for name, values in amounts.items()}
            for name in ("rows", "tokens", "utterances"):
                result[f"{name}_share"] = float(amounts[name][members].sum() / max(amounts[name].sum(), 1e-300))
            result["epochs"] = float(drawn[members].sum() / self._num_rows[members].sum())
            cut = [self.stores[number].cut for number in np.flatnonzero(members)]
            if None not in cut:
                seen = amounts["utterances"][members].sum()
                result["cut_share"] = float((epochs[members] * used[members] * np.array(cut)).sum() / max(seen, 1e-300))
            return result

        kinds = [_share_of(store, self.generic) for store in self.stores]
        of_kind = {kind: np.array([one == kind for one in kinds]) for kind in KINDS}
        number = np.arange(len(self.stores))
        return {
            "rows": rows,
            "generic": self.generic,
            "stores": {store.name: entry(number == i) for i, store in enumerate(self.stores) if kinds[i]},
            "kinds": {kind: entry(members) for kind, members in of_kind.items() if members.any()},
        }


def _rows_used(store: RowStore, task_texts: int) -> int:
    """How many rows of a store are used: as many as hold about `task_texts` texts, at least one; 0 uses all."""
    if store.kind != "task" or task_texts == 0:
        return store.num_rows
    return min(max(round(task_texts * store.num_rows / store.texts), 1), store.num_rows)


def _share_of(store: RowStore, generic: str) -> str | None:
    """Which of KINDS the store fills a share of; None for generic text that the transfer set leaves out."""
    if store.kind == "task":
        return "task"
    return "generic" if store.kind == generic else None


def _unit_shares(stores: Sequence[RowStore], transfer: Transfer, weights: Mapping[str, float]) -> np.ndarray:
    """float64 [stores], sums to 1: share by kind, then by language, then by source, counted in `transfer.unit`."""
    members: dict[str, dict[str, list[int]]] = {kind: {} for kind in KINDS}  # by kind and language
    for i, store in enumerate(stores):
        if (kind := _share_of(store, transfer.generic)) is not None:
            members[kind].setdefault(store.language.split("-")[0], []).append(i)  # "de-DE" is "de" here
    there = transfer.generic == "generic" or len(members["generic"]) > 0
    remedy = "run prepare into another folder with config.select.share above 0, or use 'generic'"
    require(there, "transfer.generic", "'selected' needs selected text, but config.prepared holds none", remedy)
    result = np.zeros(len(stores))
    for kind, kind_share in (("generic", 1 - transfer.task_share), ("task", transfer.task_share)):
        if kind_share == 0:
            continue
        problem = f"{transfer.task_share} needs {kind} text, but config.prepared holds none"
        remedy = f"add a source of kind {kind!r} or change the share"
        require(len(members[kind]) > 0, "transfer.task_share", problem, remedy)
        for language, share in _language_shares(stores, members, kind, transfer).items():
            inside = members[kind].get(language, [])
            wanted = f"{transfer.generic if kind == 'generic' else kind} text in {language!r}"
            problem = f"{transfer.language_mix!r} needs {wanted}, but config.prepared holds none"
            require(len(inside) > 0, "transfer.language_mix", problem, "add a source for it or use 'own'")
            result[inside] = kind_share * share * _source_shares([stores[i] for i in inside], weights)
    return result / result.sum()


def _language_shares(
    stores: Sequence[RowStore], members: Mapping[str, Mapping[str, list[int]]], kind: str, transfer: Transfer
) -> dict[str, float]:
    """Languages of `kind`: p(language) ~ tokens ** temperature, counted in the kind of text that sets the mix."""
    mix = transfer.language_mix
    if mix == "uniform":
        languages = dict.fromkeys([*members["generic"], *members["task"]])
        return {language: 1 / len(languages) for language in languages}
    leading = kind if mix == "own" else mix
    problem = f"{mix!r} follows the languages of {leading} text, but config.prepared holds none"
    require(len(members[leading]) > 0, "transfer.language_mix", problem, "use 'own'")
    tokens = {language: sum(stores[i].maskable for i in inside) for language, inside in members[leading].items()}
    powers = {language: float(tokens[language]) ** transfer.language_temperature for language in tokens}
    return {language: power / sum(powers.values()) for language, power in powers.items()}


def _source_shares(stores: Sequence[RowStore], weights: Mapping[str, float]) -> np.ndarray:
    """Shares of the stores of one kind and language: by source weight, and by tokens between a source's own locales."""
    tokens: dict[str, int] = defaultdict(int)
    for store in stores:
        tokens[store.source] += store.maskable
    for source in tokens:
        problem = f"it has no {source!r}, which config.prepared holds"
        require(source in weights, "sources", problem, "add it or prepare another folder")
    shares = np.array([weights[store.source] * store.maskable / tokens[store.source] for store in stores])
    return shares / shares.sum()


def _quotas(row_shares: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """int64 [sources], sums to PERIOD: rows of each source in a period, by largest remainder."""
    for name, share in zip(names, row_shares):
        # A smaller share would be rounded to no row at all, silently.
        problem = f"{name} would get {share:.2g} of the rows, less than one in {PERIOD}"
        remedy = "raise its weight or its language's share (language_temperature), or leave it out"
        require(not 0 < share < 1 / PERIOD, "transfer", problem, remedy)
    exact = row_shares * PERIOD
    quotas = np.floor(exact).astype(np.int64)
    missing = PERIOD - int(quotas.sum())
    remainders = np.where(row_shares > 0, exact - quotas, -1.0)  # a source without a share gets no spare row
    quotas[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return quotas


def _schedule(quotas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(source int32 [PERIOD], rank int64 [PERIOD]): the source of each slot, and its earlier draws in the period.

    With D = PERIOD, draw j of a source with quota q may take the slots floor(j D / q) .. ceil((j + 1) D / q) - 1.
    These are the windows of proportionate (Pfair) scheduling: any schedule that keeps them has drawn each source
    within one of i q / D after i slots. Earliest deadline first finds one, since the quotas fill the period exactly
    (Baruah, Cohen, Plaxton and Varvel, Algorithmica 1996).
    """
    source = np.repeat(np.arange(len(quotas)), quotas)
    rank = np.concatenate([np.arange(quota) for quota in quotas])
    release = rank * PERIOD // quotas[source]
    deadline = -(-(rank + 1) * PERIOD // quotas[source])
    order = np.argsort(release, kind="stable")
    # The heap holds (deadline, source) as one integer, which compares faster than a tuple; source < PERIOD.
    priority = (deadline * PERIOD + source)[order].tolist()
    waiting: list[int] = []
    added = 0
    schedule = np.empty(PERIOD, np.int32)
    for slot, released in enumerate(np.searchsorted(release[order], np.arange(PERIOD), side="right").tolist()):
        while added < released:
            heapq.heappush(waiting, priority[added])
            added += 1
        schedule[slot] = heapq.heappop(waiting) % PERIOD
    ranks = np.empty(PERIOD, np.int64)
    ranks[np.argsort(schedule, kind="stable")] = rank  # the slots of each source, in order, get its ranks 0, 1, ...
    return schedule, ranks
