"""The transfer set: a pure function from a global row index to (source, epoch, row)."""

import heapq
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kd_jax.data.permutation import counter_keys, name_key, permute
from kd_jax.data.rows import RowStore
from kd_jax.types import UserError

# The schedule repeats after this many rows; a source has a whole number of them in each.
PERIOD = 2**16

# Kinds of text that shares are given to, and the kinds of store that may fill the generic share.
KINDS = ("generic", "task")
GENERIC = ("generic", "selected")


class TransferSet:
    """Mixes row stores in fixed shares; nothing is buffered, so any index is located at once.

    `transfer` is config.transfer; `weights` gives each source's weight among the sources of its kind and language
    (config.sources.<name>.weight); `seed` orders the rows within each epoch. After any number i of rows, a source
    with share s has been drawn s * i times, off by less than one row. Stores that transfer.generic leaves out are kept
    in `stores`, with share 0. Raises UserError for shares that the stores cannot fill.
    """

    def __init__(self, stores: Sequence[RowStore], *, transfer: ConfigDict, seed: int, weights: Mapping[str, float]):
        if not stores:
            raise UserError("config.prepared: holds no rows to train on; name at least one source in config.sources")
        lengths = {store.length for store in stores}
        if len(lengths) > 1:
            raise UserError(f"config.prepared: its rows have several lengths, {sorted(lengths)}; run prepare again")
        self.stores = tuple(stores)
        self.generic: str = transfer.generic  # the kind of store that fills the generic share
        self._units = np.array([_units(store, transfer.unit) / store.num_rows for store in stores])
        unit_shares = _unit_shares(stores, transfer, weights)
        row_shares = unit_shares / self._units
        self._quotas = _quotas(row_shares / row_shares.sum(), [store.name for store in stores])
        self.row_shares = self._quotas / PERIOD
        self._schedule, self._ranks = _schedule(self._quotas)
        self._num_rows = np.array([store.num_rows for store in stores], np.int64)
        self._keys = np.array([name_key("row order", seed, store.fingerprint) for store in stores], np.uint64)
        self.fingerprint = f"{name_key(json.dumps([self._quotas.tolist(), self._keys.tolist()])):016x}"

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source int32 [n], epoch int64 [n], row int64 [n]) of global row indices int64 [n], exact up to 2**40.

        `source` counts in the order of `stores`; within an epoch every row of a source is drawn once, in that epoch's
        order.
        """
        period, slot = np.divmod(np.asarray(index, np.int64), PERIOD)
        source = self._schedule[slot]
        rank = period * self._quotas[source] + self._ranks[slot]
        epoch, place = np.divmod(rank, self._num_rows[source])
        row = permute(place, self._num_rows[source], counter_keys(self._keys[source], epoch))
        return source, epoch, row

    def drawn(self, rows: int) -> np.ndarray:
        """int64 [sources]: how often each source is drawn in the first `rows` rows."""
        periods, rest = divmod(rows, PERIOD)
        return periods * self._quotas + np.bincount(self._schedule[:rest], minlength=len(self.stores))

    def describe(self, rows: int) -> dict[str, Any]:
        """What a run of `rows` rows sees, by store and by kind, and which kind of store fills the generic share.

        For each: rows, maskable tokens and utterances (from the stores' means), their shares, the epochs, and the
        unique tokens and utterances (each counted once, however often it repeats).
        """
        drawn = self.drawn(rows)
        epochs = drawn / self._num_rows
        amounts = {
            "rows": drawn.astype(np.float64),
            "tokens": epochs * [store.maskable for store in self.stores],
            "utterances": epochs * [store.texts for store in self.stores],
            "unique_tokens": np.minimum(epochs, 1) * [store.maskable for store in self.stores],
            "unique_utterances": np.minimum(epochs, 1) * [store.texts for store in self.stores],
        }

        def entry(members: np.ndarray) -> dict[str, float]:
            result: dict[str, float] = {name: round(float(values[members].sum())) for name, values in amounts.items()}
            for name in ("rows", "tokens", "utterances"):
                result[f"{name}_share"] = float(amounts[name][members].sum() / max(amounts[name].sum(), 1e-300))
            result["epochs"] = float(drawn[members].sum() / self._num_rows[members].sum())
            return result

        kinds = [_kind(store, self.generic) for store in self.stores]
        each = {
            store.name: entry(np.arange(len(self.stores)) == i)
            for i, store in enumerate(self.stores)
            if kinds[i] is not None
        }
        of_kind = {kind: np.array([one == kind for one in kinds]) for kind in KINDS}
        return {
            "rows": rows,
            "generic": self.generic,
            "stores": each,
            "kinds": {kind: entry(members) for kind, members in of_kind.items() if members.any()},
        }


def _kind(store: RowStore, generic: str) -> str | None:
    """Which of KINDS the store fills a share of; None for one that is left out."""
    if store.kind not in GENERIC:
        return store.kind
    return "generic" if store.kind == generic else None


def _units(store: RowStore, unit: str) -> int:
    if unit == "tokens":
        return store.maskable
    if unit == "utterances":
        return store.texts
    raise UserError(f"config.transfer.unit: {unit!r} is not known; use 'tokens' or 'utterances'")


def _language(store: RowStore) -> str:
    return store.language.split("-")[0]


def _unit_shares(stores: Sequence[RowStore], transfer: ConfigDict, weights: Mapping[str, float]) -> np.ndarray:
    """float64 [stores], sums to 1: each store's share, counted in `transfer.unit`."""
    if not 0 <= transfer.task_share <= 1:
        raise UserError(f"config.transfer.task_share: {transfer.task_share} is outside 0 to 1; give a share, e.g. 0.5")
    if not transfer.language_temperature >= 0:
        raise UserError(
            f"config.transfer.language_temperature: {transfer.language_temperature} is negative; use 1 to keep the "
            "proportions, 0 for uniform"
        )
    if transfer.generic not in GENERIC:
        raise UserError(f"config.transfer.generic: {transfer.generic!r} is not known; use 'generic' or 'selected'")
    members: dict[str, dict[str, list[int]]] = {kind: defaultdict(list) for kind in KINDS}
    for i, store in enumerate(stores):
        if (kind := _kind(store, transfer.generic)) is not None:
            members[kind][_language(store)].append(i)
    if transfer.generic == "selected" and not members["generic"]:
        raise UserError(
            "config.transfer.generic: 'selected' needs selected text, but config.prepared holds none; run prepare into "
            "another folder with config.select.share above 0, or use 'generic'"
        )
    result = np.zeros(len(stores))
    for kind, kind_share in (("generic", 1 - transfer.task_share), ("task", transfer.task_share)):
        if kind_share == 0:
            continue
        if not members[kind]:
            raise UserError(
                f"config.transfer.task_share: {transfer.task_share} needs {kind} text, but config.prepared holds none; "
                f"add a source of kind {kind!r} or change the share"
            )
        mix = _language_mix(stores, members, kind, transfer)
        for language, share in mix.items():
            if not members[kind][language]:
                wanted = transfer.generic if kind == "generic" else kind
                raise UserError(
                    f"config.transfer.language_mix: {transfer.language_mix!r} needs {wanted} text in {language!r}, but "
                    "config.prepared holds none; add a source for it or use 'own'"
                )
            inner = _source_shares(stores, members[kind][language], weights)
            result[members[kind][language]] = kind_share * share * inner
    return result / result.sum()


def _language_mix(stores, members, kind: str, transfer: ConfigDict) -> dict[str, float]:
    """What `kind` follows: p(language) ~ tokens ** temperature, counted in the kind that sets the mix."""
    mix = transfer.language_mix
    if mix == "uniform":
        languages = dict.fromkeys([*members["generic"], *members["task"]])
        return {language: 1 / len(languages) for language in languages}
    if mix not in ("task", "generic", "own"):
        raise UserError(
            f"config.transfer.language_mix: {mix!r} is not known; use 'task', 'generic', 'own' or 'uniform'"
        )
    leading = kind if mix == "own" else mix
    if not members[leading]:
        raise UserError(
            f"config.transfer.language_mix: {mix!r} follows the languages of {leading} text, but config.prepared "
            "holds none; use 'own'"
        )
    tokens = {
        language: sum(stores[i].maskable for i in inside) for language, inside in members[leading].items() if inside
    }
    powers = {language: float(count) ** transfer.language_temperature for language, count in tokens.items()}
    return {language: power / sum(powers.values()) for language, power in powers.items()}


def _source_shares(stores, inside: list[int], weights: Mapping[str, float]) -> np.ndarray:
    """Shares of the stores of one kind and language: by source weight, and by tokens between a source's own locales."""
    tokens: dict[str, int] = defaultdict(int)
    for i in inside:
        tokens[stores[i].source] += stores[i].maskable
    for source in tokens:
        if source not in weights:
            raise UserError(
                f"config.sources: has no {source!r}, which config.prepared holds; add it or prepare another folder"
            )
        if not weights[source] > 0:
            raise UserError(
                f"config.sources.{source}.weight: {weights[source]} is not above 0; leave the source out instead"
            )
    shares = np.array([weights[stores[i].source] * stores[i].maskable / tokens[stores[i].source] for i in inside])
    return shares / shares.sum()


def _quotas(row_shares: np.ndarray, names: list[str]) -> np.ndarray:
    """int64 [sources], sums to PERIOD: rows of each source in a period, by largest remainder."""
    for name, share in zip(names, row_shares):
        if 0 < share < 1 / PERIOD:
            raise UserError(
                f"config.transfer: {name} would get {share:.2g} of the rows, less than one in {PERIOD}; raise its "
                "weight or its language's share (language_temperature), or leave it out"
            )
    exact = row_shares * PERIOD
    quotas = np.floor(exact).astype(np.int64)
    missing = PERIOD - int(quotas.sum())
    remainders = np.where(row_shares > 0, exact - quotas, -1.0)
    quotas[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return quotas


def _schedule(quotas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(source int32 [PERIOD], rank int64 [PERIOD]): which source each slot draws, for the how-manieth time in the
    period.

    The j-th draw of a source with q draws falls into the slots floor(j D / q) .. ceil((j + 1) D / q) - 1, earliest
    deadline first; its count after i slots is then within one of i q / D (P-fairness: Baruah, Cohen, Plaxton and
    Varvel, Algorithmica 1996).
    """
    source = np.repeat(np.arange(len(quotas)), quotas)
    rank = np.concatenate([np.arange(quota) for quota in quotas])
    release = rank * PERIOD // quotas[source]
    deadline = -(-(rank + 1) * PERIOD // quotas[source])
    order = np.argsort(release, kind="stable")
    priority = (deadline * PERIOD + source)[order].tolist()  # fewer sources than slots, so the pair fits one number
    waiting: list[int] = []
    added = 0
    schedule = np.empty(PERIOD, np.int32)
    for slot, released in enumerate(np.searchsorted(release[order], np.arange(PERIOD), side="right").tolist()):
        while added < released:
            heapq.heappush(waiting, priority[added])
            added += 1
        schedule[slot] = heapq.heappop(waiting) % PERIOD
    ranks = np.empty(PERIOD, np.int64)
    by_source = np.argsort(schedule, kind="stable")
    ranks[by_source] = rank
    return schedule, ranks
