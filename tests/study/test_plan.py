import json
import pathlib

import pytest
from ml_collections import ConfigDict

from kd_jax.config import to_dict
from kd_jax.main import study
from kd_jax.study.plan import FITTED, Planner, Recipe, Student
from kd_jax.types import UserError
from tests.support import pretrained


def planner(config=None) -> Planner:
    return Planner(to_dict(config or pretrained.get_config()), study.KEYS)


def all_stages(config):
    """Every stage with its folder, as if the first recipe had won everywhere."""
    plan = planner(config)
    tasks = config.study.tasks
    return plan.plan({(one.name, task): plan.recipes_of(one)[0] for one in plan.students for task in tasks})[:-1]


def teacher_stages(plan: Planner):
    return [stage for stage in plan.plan({}) if stage.phase == "teachers"]


def test_baselines_are_always_compared():
    names = [student.name for student in planner().students]
    assert names[:4] == ["ngrams", "probe", "scratch", "mlm-task"]
    config = pretrained.get_config()
    config.study.update({"ngrams": False, "probe": False})
    assert [student.name for student in planner(config).students][:2] == ["scratch", "mlm-task"]
    config.study.mlm_sets = ()
    with pytest.raises(UserError, match=r"config\.study\.mlm_sets"):
        planner(config)


def test_ngrams_and_the_probe_have_no_seed_and_the_students_labels():
    config = pretrained.get_config()
    plan = planner(config)
    for kind, features in (("ngrams", "ngrams"), ("probe", "teacher")):
        assert plan.seeds(Student(kind)) == ()
        (stage,) = {
            plan.baseline(Student(kind), task).folder: plan.baseline(Student(kind), task) for task in ("dc", "icner")
        }.values()
        settings = stage.config["baseline"]
        assert (settings["features"], settings["max_train"], settings["tasks"]) == (features, 400, ("dc", "icner"))
        assert settings["c_values"] == (1.0, 10.0, 100.0), "two recipes, and at least three values"
    assert plan.baseline(Student("probe"), "dc").config["teacher_checkpoint"] == "stage:" + plan.teacher().folder
    assert "finetune" not in stage.config and plan.baseline(Student("ngrams"), "dc").accelerator is False
    folder = plan.baseline(Student("ngrams"), "dc").folder
    config.finetune.warmup_steps += 1
    assert planner(config).baseline(Student("ngrams"), "dc").folder == folder
    config.study.recipe_epochs = (4, 8)
    assert planner(config).c_values == (1.0, 4.64, 21.5, 100.0), "one for each of four recipes"


def test_the_finetuned_teacher_labels_what_students_did_not_see():
    config = pretrained.get_config()
    config.study.update({"finetune_teacher": True, "label_unlabeled": True, "teacher_epochs": 3})
    plan = planner(config)
    names = [one.name for one in plan.students]
    assert names[:6] == ["ngrams", "ngrams-labeled", "probe", "finetuned", "scratch", "scratch-labeled"]
    stages = {stage.name: stage for stage in all_stages(config)}
    teacher = stages["dc-finetuned-seed0"]
    assert teacher.config["finetune"]["init_from"] == "stage:" + plan.teacher().folder
    recipe = ("learning_rate", "encoder_rate", "epochs")
    assert [teacher.config["finetune"][name] for name in recipe] == [2e-3, 0.05, 3]
    assert teacher.phase == stages["label-dc-finetuned-seed0"].phase == "students"
    assert stages["label-dc-finetuned-seed0"].config["evaluate"]["partition"] == "unlabeled"
    labels = "stage:" + stages["label-dc-finetuned-seed0"].folder
    assert stages["dc-scratch-labeled-seed2"].config["finetune"]["labels"] == labels
    assert stages["ngrams-labeled-dc"].config["baseline"]["labels"] == labels
    assert stages["ngrams-labeled-icner"].config["baseline"]["labels"] != labels
    assert stages["dc-scratch-seed2"].config["finetune"]["labels"] == ""
    assert "dc-finetuned-seed1" not in stages and "test-dc-finetuned-seed0" in stages

    config.finetune.max_train = 0
    with pytest.raises(UserError, match=r"config\.study\.label_unlabeled: every train utterance has its given label"):
        planner(config)
    config.finetune.max_train, config.study.finetune_teacher = 400, False
    with pytest.raises(UserError, match=r"config\.study\.label_unlabeled: no teacher is finetuned"):
        planner(config)


def test_students_that_start_from_their_teacher_have_controls_that_do_so_too():
    config = pretrained.get_config()
    config.distill.init = "teacher"
    plan = planner(config)
    names = [one.name for one in plan.students]
    assert names[2:6] == ["scratch", "initialized", "mlm-task", "mlm-task-initialized"]
    started = plan.encoder(Student("initialized"), 1)
    assert started.command == "initialize" and started.config["seed"] == 1
    distilled = plan.encoder(Student("distilled", "task", "generic"), 1)
    for key in ("student", "vocabulary", "distill", "teacher_checkpoint", "prepared"):
        assert started.config[key] == distilled.config[key], key
    mlm, plain = plan.encoder(Student("mlm", "task", "initialized"), 1), plan.encoder(Student("mlm", "task"), 1)
    assert mlm.config["pretrain"] == {**plain.config["pretrain"], "init_from": "stage:" + started.folder}
    assert mlm.config["transfer"] == plain.config["transfer"] == distilled.config["transfer"]
    finetuned = plan.finetune(Student("initialized"), 1, "dc", plan.recipes[0])
    assert finetuned.config["finetune"]["init_from"] == "stage:" + started.folder


def test_every_stage_comes_after_what_it_needs_and_folders_are_unique():
    stages = all_stages(pretrained.get_config())
    seen = set()
    for stage in stages:
        assert set(stage.needs) <= seen, stage.name
        seen.add(stage.folder)
    by_folder = {}
    for stage in stages:
        assert by_folder.setdefault(stage.folder, stage.name) == stage.name


def test_a_change_reaches_only_the_stages_that_depend_on_it():
    before = {stage.name: stage.folder for stage in all_stages(pretrained.get_config())}
    config = pretrained.get_config()
    config.distill.kl.temperature = 4.0
    after = {stage.name: stage.folder for stage in all_stages(config)}
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all("distilled" in name for name in changed)
    assert not any("cache" in name for name in changed)  # hidden states serve any temperature
    config = pretrained.get_config()
    config.mesh.fsdp = 2
    config.distill.log_every = 1
    assert {stage.name: stage.folder for stage in all_stages(config)} == before


def test_student_size_leaves_the_teacher_alone():
    config = pretrained.get_config()
    config.student.num_layers = 1
    assert planner(config).teacher().folder == planner().teacher().folder


def test_mlm_baseline_sees_the_same_text_and_steps_as_the_distilled_student():
    plan = planner()
    mlm = plan.encoder(Student("mlm", "task"), 1)
    distilled = plan.encoder(Student("distilled", "task", "generic"), 1)
    assert mlm is not None and distilled is not None
    for key in ("transfer", "masking", "student", "seed", "prepared"):
        assert mlm.config[key] == distilled.config[key], key
    for key in ("steps", "batch_size", "learning_rate", "schedule", "weight_decay"):
        assert mlm.config["pretrain"][key] == distilled.config["distill"][key], key
    assert mlm.config["pretrain"]["model"] == "student"


def test_distillation_settings_are_the_same_for_all_transfer_sets():
    plan = planner()
    configs = [plan.encoder(Student("distilled", name, "generic"), 0).config for name in ("generic", "mix50", "task")]
    assert len({str(config["distill"]) for config in configs}) == 1
    assert [config["transfer"]["task_share"] for config in configs] == [0.0, 0.5, 1.0]


def test_recipe_reaches_the_finetuning_stage():
    stage = planner().finetune(Student("scratch"), 2, "dc", Recipe(0.5, 7, "max", 0.2))
    job = stage.config["finetune"]
    assert (job["learning_rate"], job["epochs"], job["pooling"], stage.config["seed"]) == (0.5, 7, "max", 2)
    assert (job["init_from"], job["encoder_rate"]) == ("", 0.2)


def test_encoder_rates_are_searched_where_they_are_given():
    config = pretrained.get_config()
    config.finetune.encoder_rate = 0.5
    assert {recipe.encoder_rate for recipe in planner(config).recipes} == {0.5}
    before = len(planner(config).recipes)
    config.study.recipe_encoder_rates = (1.0, 0.3)
    rates = [recipe.encoder_rate for recipe in planner(config).recipes]
    assert len(rates) == 2 * before and set(rates) == {1.0, 0.3}
    config.study.recipe_encoder_rates = (1.5,)
    with pytest.raises(UserError, match=r"config\.study\.recipe_encoder_rates: 1\.5 is outside"):
        planner(config)


def test_poolings_are_searched_like_rates_and_epochs_and_all_students_have_as_many_trials():
    config = pretrained.get_config()
    config.study.recipe_epochs = (4, 8)
    config.finetune.pooling = "mean"
    assert {recipe.pooling for recipe in planner(config).recipes} == {"mean"}
    config.study.recipe_poolings = ("max", "first")
    plan = planner(config)
    assert len(plan.recipes) == len(set(plan.recipes)) == 2 * 2 * 2
    searched = [student for student in plan.students if student.kind not in FITTED]
    trials = {(student, task): len(plan.search(student, task)) for student in searched for task in ("dc", "icner")}
    assert set(trials.values()) == {8} and len(plan.c_values) == 8
    latency = plan.latency()
    assert latency is not None and latency.config["latency"]["pooling"] == "max"
    config.study.recipe_poolings = ("sum",)
    with pytest.raises(UserError, match=r"config\.study\.recipe_poolings: 'sum' is unknown; use first, mean, max"):
        planner(config)


def test_share_outside_zero_to_one_names_the_key():
    config = pretrained.get_config()
    config.study.transfer_sets.mix50 = 1.5
    with pytest.raises(UserError, match=r"config\.study\.transfer_sets\.mix50: 1\.5"):
        planner(config)


def test_unknown_transfer_set_is_named():
    config = pretrained.get_config()
    config.study.adapted_sets = ("tusk",)
    with pytest.raises(UserError, match="'tusk' is not a transfer set"):
        planner(config)


def distilled(config, teacher, transfer_set="task"):
    return planner(config).encoder(Student("distilled", transfer_set, teacher), 0)


def test_students_of_one_teacher_share_one_cache_that_covers_them_all():
    config = pretrained.get_config()
    plan = planner(config)
    cache = plan.cached("generic")[0]
    assert cache.config["cache"]["task_shares"] == (0.0, 0.5, 1.0)
    assert cache.config["cache"]["seeds"] == config.study.seeds
    assert cache.config["cache"]["steps"] == config.distill.steps
    for name in config.study.transfer_sets:
        for seed in config.study.seeds:
            stage = plan.encoder(Student("distilled", name, "generic"), seed)
            assert stage.config["teacher_cache"] == f"stage:{cache.folder}"
            assert cache.folder in stage.needs
    adapted = plan.cached("adapted")[0]
    assert adapted.folder != cache.folder
    assert adapted.config["cache"]["task_shares"] == (1.0,)
    assert distilled(config, "adapted").config["teacher_cache"] == f"stage:{adapted.folder}"


def test_more_seeds_and_transfer_sets_leave_finished_students_as_they_are():
    config = pretrained.get_config()
    before = {stage.name: stage.folder for stage in all_stages(config)}
    config.study.seeds = (*config.study.seeds, 77)
    config.study.transfer_sets = {**config.study.transfer_sets, "quarter": 0.25}
    after = {stage.name: stage.folder for stage in all_stages(config)}
    assert {name for name in before if before[name] != after[name]} == {"cache-generic", "cache-adapted"}
    config.cache.dtype = "float32"  # other predictions, so other students
    other = {stage.name: stage.folder for stage in all_stages(config)}
    assert all(other[name] != after[name] for name in after if name.startswith("distilled"))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.distill.hidden.update({"weight": 1.0}),
        lambda config: config.distill.relations.update({"final_weight": 0.5}),
        lambda config: config.distill.update({"kd_positions": "all"}),
        lambda config: config.study.update({"cache": False}),
    ],
)
def test_what_a_cache_does_not_serve_loads_the_teacher(change):
    config = pretrained.get_config()
    change(config)
    assert planner(config).cached("generic") == []
    stage = distilled(config, "generic")
    assert stage.config["teacher_cache"] == ""
    assert "," not in stage.config["teacher_checkpoint"]


def of_clean_text(**changes):
    config = pretrained.get_config()
    config.distill.clean = True
    config.distill.kl.weight = config.distill.mlm.weight = 0.0
    config.distill.hidden.weight = 1.0
    config.distill.update(changes)
    return config


def test_students_of_clean_text_share_the_states_of_the_layers_that_they_read():
    config = of_clean_text()
    config.study.adapted_sets = ("task",)
    plan = planner(config)
    states = plan.cached("generic")[0]
    assert states.command == "cache_states"
    assert states.config["states"]["layers"] == "1,2"  # of a teacher with 3 layers, for a student with 2
    assert states.config["states"]["kinds"] == ("generic", "task")
    assert plan.cached("adapted")[0].config["states"]["kinds"] == ("task",)
    assert not {"cache", "transfer", "masking", "student", "vocabulary"} & states.config.keys()
    for name in config.study.transfer_sets:
        for seed in config.study.seeds:
            stage = plan.encoder(Student("distilled", name, "generic"), seed)
            assert stage.config["teacher_cache"] == f"stage:{states.folder}"
            assert states.folder in stage.needs
    for change in ({"hidden": {"layers": "last"}}, {"init": "teacher"}, {"sentence": {"weight": 1.0}}):
        other = of_clean_text(**change)
        (stage,) = planner(other).cached("generic")
        assert (stage.folder == states.folder) == ("hidden" not in change)
    only = of_clean_text(hidden={"weight": 0.0}, sentence={"weight": 1.0})
    assert planner(only).cached("generic")[0].config["states"]["layers"] == "none"
    only.distill.embeddings.weight = 1.0
    assert planner(only).cached("generic") == []


def test_students_of_states_and_then_logits_read_a_cache_of_each():
    config = of_clean_text(masked_from=0.5)
    config.distill.kl.weight = 1.0
    plan = planner(config)
    states, logits = plan.cached("generic")
    assert (states.command, logits.command) == ("cache_states", "cache_teacher")
    assert states.folder == planner(of_clean_text()).cached("generic")[0].folder
    stage = plan.encoder(Student("distilled", "task", "generic"), 0)
    assert stage.config["teacher_cache"] == f"stage:{states.folder},stage:{logits.folder}"
    assert {states.folder, logits.folder} <= set(stage.needs)
    config.study.seeds = (0, 1, 2, 3)  # the second cache gets more rows, and the student stays as it is
    assert planner(config).cached("generic")[1].folder != logits.folder
    assert planner(config).encoder(Student("distilled", "task", "generic"), 0).folder == stage.folder


def test_another_kind_of_text_leaves_finished_students_of_states_as_they_are():
    config = of_clean_text()
    config.study.transfer_sets = ConfigDict({"task": 1.0})
    before = {stage.name: stage.folder for stage in all_stages(config)}
    config.study.transfer_sets = ConfigDict({"task": 1.0, "mix50": 0.5})
    after = {stage.name: stage.folder for stage in all_stages(config)}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"states-generic"}


def test_a_schedule_of_teachers_switches_at_its_step_and_an_average_does_not():
    config = pretrained.get_config()
    config.study.update({"schedule_sets": ("task",), "average_sets": ("mix50",), "schedule_switch": 0.4})
    plan = planner(config)
    both = f"stage:{plan.teacher().folder},stage:{plan.adapted_teacher().folder}"
    schedule, average = distilled(config, "schedule"), distilled(config, "average", "mix50")
    assert schedule.config["teacher_checkpoint"] == average.config["teacher_checkpoint"] == both
    assert schedule.config["distill"]["teacher_steps"] == (0, 20)
    assert average.config["distill"]["teacher_steps"] == []
    assert schedule.folder in {stage.folder for stage in all_stages(config)}


def test_a_chain_goes_by_way_of_an_intermediate():
    config = pretrained.get_config()
    config.study.chain_sets = ("task",)
    config.chain.steps = 77
    stages = {stage.folder: stage for stage in all_stages(config)}
    student = distilled(config, "chain")
    (intermediate,) = (stages[need] for need in student.needs if stages[need].command == "distill")
    assert student.config["teacher_checkpoint"] == f"stage:{intermediate.folder}"
    assert intermediate.config["student"] == to_dict(config.intermediate)
    assert intermediate.config["distill"]["steps"] == 77
    assert intermediate.config["distill"]["kl"] == to_dict(config.distill.kl)
    assert intermediate.config["transfer"]["task_share"] == 1.0


def test_a_transfer_set_may_use_a_part_of_the_task_text():
    config = pretrained.get_config()
    before = {stage.name: stage.folder for stage in all_stages(config)}
    config.study.transfer_sets = {**config.study.transfer_sets, "few": 0.5}
    config.study.task_texts = {"few": 100}
    few, all_text = distilled(config, "generic", "few"), distilled(config, "generic", "mix50")
    assert (few.config["transfer"]["task_share"], few.config["transfer"]["task_texts"]) == (0.5, 100)
    assert all_text.config["transfer"]["task_texts"] == 0
    assert few.folder != all_text.folder == before["distilled-mix50-generic-seed0"]
    cache = planner(config).cached("generic")[0].config["cache"]
    assert dict(zip(config.study.transfer_sets, cache["task_texts"], strict=True)) == {
        **dict.fromkeys(config.study.transfer_sets, 0),
        "few": 100,
    }
    config.transfer.task_texts = 7
    limits = {
        one: distilled(config, "generic", one).config["transfer"]["task_texts"] for one in ("few", "task", "generic")
    }
    assert limits == {"few": 100, "task": 7, "generic": 0}
    for wrong, message in (
        ({"fewer": 100}, r"config\.study\.task_texts: fewer is no transfer set with task text"),
        ({"generic": 100}, r"generic is no transfer set with task text"),
        ({"few": 0}, r"config\.study\.task_texts\.few: 0 is not above 0"),
    ):
        config.study.task_texts = wrong
        with pytest.raises(UserError, match=message):
            planner(config)


def test_selected_text_is_a_further_transfer_set():
    config = pretrained.get_config()
    config.study.selected_sets = {"selected": 0.0, "mix": 0.5}
    with pytest.raises(UserError, match=r"config\.select\.share"):
        planner(config)
    config.select.share = 0.1
    stage = distilled(config, "generic", "selected")
    assert (stage.config["transfer"]["task_share"], stage.config["transfer"]["generic"]) == (0.0, "selected")
    cache = planner(config).cached("generic")[0].config["cache"]
    assert cache["task_shares"] == (0.0, 0.5, 1.0, 0.5, 0.0)  # sets stand in the order of their names
    assert cache["generic"] == ("generic", "generic", "generic", "selected", "selected")
    config.study.selected_sets = {"task": 0.0}
    with pytest.raises(UserError, match="task is a transfer set too"):
        planner(config)


def test_an_imported_teacher_gets_a_head_and_is_then_adapted():
    config = pretrained.get_config()
    config.study.teacher_import = "folder/of/a/model"
    plan = planner(config)
    stages = {stage.name: stage for stage in teacher_stages(plan)}
    assert list(stages) == ["prepare", "import-teacher", "train-teacher-head", "adapt-teacher"]
    assert stages["import-teacher"].config["import_model"]["path"] == "folder/of/a/model"
    head = stages["train-teacher-head"].config
    assert head["train_body"] is False and head["pretrain"]["init_from"] == "stage:" + stages["import-teacher"].folder
    adapted = stages["adapt-teacher"].config
    head = "stage:" + stages["train-teacher-head"].folder
    assert adapted["train_body"] is True and adapted["pretrain"]["init_from"] == head
    assert plan.cached("generic")[0].config["teacher_checkpoint"] == head


def test_an_imported_teacher_with_a_head_of_its_own_is_used_as_it_is():
    config = pretrained.get_config()
    config.study.teacher_import, config.study.train_head = "folder/of/a/model", False
    plan = planner(config)
    assert [stage.name for stage in teacher_stages(plan)] == ["prepare", "import-teacher", "adapt-teacher"]
    assert plan.teacher().command == "import_model"


def test_the_import_does_not_depend_on_how_its_head_is_trained():
    config = pretrained.get_config()
    config.study.teacher_import = "folder/of/a/model"
    plan = planner(config)
    imported, teacher = plan.imported().folder, plan.teacher().folder
    config.pretrain.steps += 1
    after = planner(config)
    assert after.imported().folder == imported
    assert after.teacher().folder != teacher


def test_latency_is_measured_last_of_the_sizes_that_the_study_has():
    config = pretrained.get_config()
    last = all_stages(config)[-1]
    measured = last.config["latency"]
    assert (last.command, measured["models"], measured["task"]) == ("latency", ("teacher", "student"), "icner")
    assert {"teacher", "student", "prepared"} <= set(last.config) and "intermediate" not in last.config
    config.distill.steps += 1
    config.latency.calls += 1
    assert planner(config).latency().folder != last.folder
    config.latency.calls -= 1
    assert planner(config).latency().folder == last.folder
    config.study.update({"chain_sets": ("task",), "tasks": ("dc",)})
    chain = planner(config).latency().config["latency"]
    assert (chain["models"], chain["task"]) == (("teacher", "intermediate", "student"), "dc")
    config.study.latency = False
    assert "latency" not in {stage.command for stage in all_stages(config)}


def everything():
    """Every kind of stage: caches of both teachers, schedule, average, chain and selected text."""
    config = pretrained.get_config()
    config.select.share = 0.1
    config.study.selected_sets = ConfigDict({"near": 0.25})
    config.study.update({"schedule_sets": ("task",), "average_sets": ("mix50",), "chain_sets": ("near",)})
    config.study.update({"seeds": (0, 1), "schedule_switch": 0.3})
    config.cache.format = "top_k"
    return config


@pytest.mark.parametrize(
    "name, config", [("smoke", lambda: pretrained.get_config("smoke")), ("everything", everything)]
)
def test_folders_of_stages_are_those_of_earlier_versions(name, config):
    """A finished study stays finished when kd_jax is updated."""
    golden = json.loads(pathlib.Path(__file__).with_name("stage_folders.json").read_text())[name]
    folders = [stage.folder for stage in all_stages(config())]
    message = "if you meant this, write the new names, and say in CHANGELOG.md which stages run again"
    assert folders == golden, message
