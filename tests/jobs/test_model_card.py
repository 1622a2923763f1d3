"""Parts of a card: results as a table, and teachers by name; the card as a whole is tested in test_export.py."""

from kd_jax.jobs import model_card, trained
from kd_jax.runtime.files import write_json
from kd_jax.study.report.numbers import MEASURES
from tests.support.finished_runs import small_config


def row(test_set, metric, value):
    return {"test_set": test_set, "metric": metric, "value": value, "scope": "all"}


def test_whole_partition_stands_first_and_gaps_stay_empty():
    rows = [row("tail", "slot_f1", 0.5), row("test", "slot_f1", 0.75), row("test", "semer", 0.25)]
    assert model_card.results_table(rows).splitlines() == [
        "| in % | test | tail |",
        "|---|---|---|",
        "| Slot F1 | 75.0 | 50.0 |",
        "| SemER | 25.0 |  |",
    ]


def test_measures_have_the_names_of_the_report():
    assert model_card.SHOWN.items() >= {measure.shown: measure.title for measure in MEASURES}.items()


def write_run(folder, keys, run=None, **changes):
    """config.json and run.json of a run that reads some keys of the config."""
    config = small_config()
    for name, value in changes.items():
        block, _, field = name.partition("__")
        config[block] = value if not field else {**config[block], field: value}
    values = config.to_dict()
    folder.mkdir()
    write_json(folder / "config.json", {"command": folder.name, "config": {key: values[key] for key in keys}})
    write_json(folder / "run.json", run or {})
    return str(folder)


PRETRAINED = ("pretrain", "teacher", "transfer", "train_body")


def test_teachers_are_named_by_their_model(tmp_path):
    path = "org/multilingual-e5-small"
    hub = {"hub_name": path, "license": "mit"}
    keys = ("import_model", "teacher")
    imported = write_run(tmp_path / "imported-0a1b", keys, hub, import_model__path=path, import_model__revision="")
    start = {"pretrain__init_from": imported}
    head = write_run(tmp_path / "head-2c3d", PRETRAINED, train_body=False, transfer__task_share=0.0, **start)
    adapted = write_run(tmp_path / "adapted-4e5f", PRETRAINED, **start)
    own = write_run(tmp_path / "own-6a7b", PRETRAINED)
    distilled = ("distill", "student", "teacher_checkpoint", "teacher_cache", "transfer")
    cache = write_run(tmp_path / "cache-8c9d", ("teacher_checkpoint", "cache"), teacher_checkpoint=head)
    e5 = f"multilingual-e5-small (imported from {path})"
    mixed = "a transfer set of 50% task-specific text by tokens, the rest generic"
    shape = small_config().teacher
    ours = f"a teacher of {shape.num_layers} layers x {shape.hidden_size} wide, pretrained on {mixed}"
    for number, (teachers, words, imports) in enumerate(
        (
            ({"teacher_checkpoint": imported}, e5, [hub]),
            ({"teacher_cache": cache}, f"{e5}, with a masked-LM head trained on {mixed.replace('50%', '0%')}", [hub]),
            ({"teacher_checkpoint": f"{own},{adapted}"}, f"{ours} and {e5}, trained further on {mixed}", [hub]),
            ({"teacher_checkpoint": str(tmp_path / "gone")}, "gone", []),
        )
    ):
        student = tmp_path / f"distilled-{number}"
        write_run(student, distilled, **teachers)
        ((_, config),) = model_card._chain(student)
        assert model_card._names(config) == words
        assert model_card._imported(student) == imports
        finetuned = tmp_path / f"dc-{number}"
        write_run(finetuned, ("finetune",), finetune__init_from=str(student))
        assert model_card._imported(finetuned) == imports


def test_nothing_beside_a_run_gives_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    assert model_card.scored_by(tmp_path / "run", "") is None


def test_a_limit_of_task_texts_is_named_and_runs_without_the_key_have_none(tmp_path):
    keys = ("pretrain", "student", "transfer", "train_body")
    limited = write_run(tmp_path / "limited", keys, transfer__task_share=0.5, transfer__task_texts=1000)
    config = trained.run_config(limited, "x")
    assert model_card._transfer_set(config) == (
        "a transfer set of 50% task-specific text by tokens, of 1,000 texts per store, the rest generic"
    )
    older = config.to_dict()
    del older["transfer"]["task_texts"]
    write_json(tmp_path / "limited" / "config.json", {"command": "distill", "config": older})
    assert trained.run_config(limited, "x").transfer.task_texts == 0
