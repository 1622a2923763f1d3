"""Mixes two stores of rows, 30 % generic and 70 % task text, without any buffer.

python -m docs.examples.transfer_set
"""

import pathlib
import tempfile

import numpy as np

from kd_jax.config.data import Masking, Transfer
from kd_jax.data.batches import MaskedBatches
from kd_jax.data.embedded.utterances import embedded_texts, embedded_utterances
from kd_jax.data.rows import RowStore, StoreWriter
from kd_jax.data.text.tokenizer import train_tokenizer
from kd_jax.data.transfer_set import TransferSet


def write_store(folder: pathlib.Path, kind: str, texts: list[str], tokenizer) -> RowStore:
    """Texts as packed rows of 32 tokens in `folder`."""
    folder.mkdir()
    identity = {"name": f"{kind}-en", "source": kind, "kind": kind, "language": "en", "split": "train"}
    with StoreWriter(folder, **identity, length=32, open_rows=64, tokenizer=tokenizer, built_from="example") as writer:
        writer.add(tokenizer.encode(texts))
        writer.finish(removed={})
    return RowStore(folder, tokenizer.fingerprint)


def main() -> None:
    generic = list(embedded_texts("en"))
    task = [one.text for one in embedded_utterances(["en-US"]) if one.partition == "train"]
    tokenizer = train_tokenizer(generic + task, 1000)
    with tempfile.TemporaryDirectory() as folder:
        stores = [
            write_store(pathlib.Path(folder, kind), kind, texts, tokenizer)
            for kind, texts in (("generic", generic), ("task", task))
        ]
        for store in stores:
            print(f"{store.name}: {store.texts} texts in {store.num_rows} rows, {store.maskable} maskable tokens")

        transfer = Transfer(task_share=0.7)  # of the tokens; unit="utterances" counts texts
        mixed = TransferSet(stores, transfer=transfer, seed=0, weights={"generic": 1.0, "task": 1.0})
        for rows in (10, 100, 10_000):
            shares = {name: f"{one['tokens_share']:.3f}" for name, one in mixed.describe(rows)["kinds"].items()}
            print(f"after {rows:6} rows, share of tokens: {shares}")

        # Any row of the endless sequence is found in constant time: its store, the pass over it, and the row there.
        for index in (0, 1, 123_456_789):
            source, epoch, row = (int(values[0]) for values in mixed.locate(np.array([index])))
            print(f"global row {index}: row {row} of {stores[source].name} in its epoch {epoch}")

        # So batch k needs no history: after a restart the sequence continues exactly, on any number of hosts.
        batches = MaskedBatches(stores, mixed, Masking(), tokenizer, batch_size=8)
        again = MaskedBatches(stores, mixed, Masking(), tokenizer, batch_size=8)
        whole = batches.batch(1000)
        halves = [again.batch(1000, process_index, 2) for process_index in (0, 1)]
        same = all(np.array_equal(whole[name], np.concatenate([half[name] for half in halves])) for name in whole)
        print(f"batch 1000 resumed on two hosts is the same: {same}; fingerprint {batches.fingerprint}")


if __name__ == "__main__":
    main()
