"""Tiny inputs and finished runs of every command, made once with the commands themselves, for fault injection."""

import gzip
import json
import pathlib
import shutil
import tarfile
from collections.abc import Sequence
from typing import Any

from kd_jax.data.embedded.utterances import embedded_texts, embedded_utterances
from kd_jax.data.text.utterances import Utterance, subset, write_massive
from tests.faults.worker import Worker

LOCALES = ("en-US", "de-DE")
LANGUAGES = ("en", "de")
CONFIG = ("--config=tests/support/pretrained.py:smoke", "--config.progress=False", "--config.tensorboard=False")


def options(**values: Any) -> list[str]:
    """Overrides of config keys, with __ for dots."""
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]


def text_options(folder: pathlib.Path) -> list[str]:
    """What `prepare` reads by default."""
    return [
        *options(nlu__format="massive", nlu__path=folder / "massive", nlu__locales=",".join(LOCALES)),
        *options(sources__generic__format="text", sources__generic__path=f"{folder}/text/{{language}}.txt"),
        *options(sources__generic__languages=",".join(LANGUAGES), rows__heldout_share=0.2, tokenizer__vocab_size=400),
    ]


STATES = options(distill__clean=True, distill__kl__weight=0.0, distill__mlm__weight=0.0, distill__hidden__weight=1.0)
STATES += options(distill__hidden__layers="last")


class Fixture:
    """A folder of inputs and runs; `make` fills it."""

    def __init__(self, folder: pathlib.Path, worker: Worker):
        self.folder, self.worker = folder, worker

    def run(self, name: str, arguments: Sequence[str], workdir: str) -> None:
        """Runs a command that must succeed."""
        given = [*CONFIG, *arguments, f"--workdir={self.folder / workdir}"]
        ended = self.worker.run(name, given, limit=300.0)
        assert ended.code == 0, f"{name} {' '.join(given)}\n{ended.errors}"

    def at(self, name: str) -> pathlib.Path:
        return self.folder / name

    def make(self) -> None:
        """Writes everything, in about a minute."""
        self._texts()
        self.run("prepare", text_options(self.folder), "prepared")
        here = options(prepared=self.at("prepared"))
        # Three steps, so that a run stopped after two has one left.
        self.run("pretrain", [*here, *options(pretrain__steps=3, pretrain__checkpoint_every=1)], "teacher")
        teacher = [*here, *options(teacher_checkpoint=self.at("teacher"))]
        shutil.copytree(self.at("teacher"), self.at("stopped"))
        for name in ("DONE", "heldout.json", "checkpoints/3"):
            path = self.at("stopped") / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.run("cache_teacher", [*teacher, *options(cache__format="top_k", cache__k=8)], "predictions")
        self.run("cache_states", [*teacher, *STATES, *options(states__layers="-1")], "states")
        self.run("distill", teacher, "student")
        start = [*here, *options(finetune__init_from=self.at("student"), finetune__max_train=20)]
        for task in ("dc", "icner"):
            self.run(f"finetune_{task}", start, task)
            finetuned = [*here, *options(evaluate__checkpoint=self.at(task))]
            self.run("evaluate", finetuned, f"test-{task}")
        self.run("evaluate", [*finetuned, *options(evaluate__partition="unlabeled")], "labels")
        self.run("export", options(export__checkpoint=self.at("teacher")), "model")
        for task in ("dc", "icner"):
            self.run("export", options(export__checkpoint=self.at(task), export__int8=True), f"served-{task}")
        self._other_forms()

    def _texts(self) -> None:
        utterances: list[Utterance] = []
        every = embedded_utterances(LOCALES)
        for partition, count in (("train", 40), ("dev", 8), ("test", 12)):
            utterances += [one for one in subset(every, partition, count) if one.partition == partition]
        self.at("massive").mkdir(parents=True)
        write_massive(utterances, self.at("massive"))
        for form in ("text", "jsonl"):
            self.at(form).mkdir()
        for language in LANGUAGES:
            texts = [text for _, text in zip(range(120), embedded_texts(language))]
            lines = "".join(f"{text}\n" for text in texts)
            (self.at("text") / f"{language}.txt").write_text(lines, encoding="utf-8")
            records = "".join(
                json.dumps({"text": text, "n": n}, ensure_ascii=False) + "\n" for n, text in enumerate(texts)
            )
            (self.at("jsonl") / f"{language}.jsonl").write_text(records, encoding="utf-8")

    def _other_forms(self) -> None:
        """The same texts compressed, as Parquet and in an archive; the model in shards; a WordPiece vocabulary."""
        import pyarrow
        import pyarrow.parquet
        from safetensors.numpy import load_file, save_file

        for form in ("massive", "text"):
            self.at(f"{form}-gzip").mkdir()
            self.at(f"{form}-parquet").mkdir()
            for file in sorted(self.at(form).iterdir()):
                data = file.read_bytes()
                (self.at(f"{form}-gzip") / f"{file.name}.gz").write_bytes(gzip.compress(data, mtime=0))
                lines = data.decode().splitlines()
                rows = [json.loads(line) if form == "massive" else {"text": line} for line in lines]
                table = pyarrow.Table.from_pylist(rows)
                pyarrow.parquet.write_table(table, self.at(f"{form}-parquet") / f"{file.stem}.parquet")
        with tarfile.open(self.at("massive.tar.gz"), "w:gz") as archive:
            archive.add(self.at("massive"), "1.1/data")
        shutil.copytree(self.at("model"), self.at("shards"))
        tensors = load_file(self.at("shards") / "model.safetensors")
        (self.at("shards") / "model.safetensors").unlink()
        index: dict[str, str] = {}
        for number in range(2):
            name = f"model-{number + 1:05d}-of-00002.safetensors"
            part = {key: tensors[key] for key in sorted(tensors)[number::2]}
            save_file(part, self.at("shards") / name, metadata={"format": "pt"})
            index |= dict.fromkeys(part, name)
        values = {"metadata": {"total_size": sum(one.nbytes for one in tensors.values())}, "weight_map": index}
        (self.at("shards") / "model.safetensors.index.json").write_text(json.dumps(values, indent=2))
        words = sorted({character for file in self.at("text").iterdir() for character in file.read_text().lower()})
        words = [word for word in words if word.strip()]
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"##{word}" for word in words)]
        self.at("wordpiece").mkdir()
        (self.at("wordpiece") / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
        (self.at("wordpiece") / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
