import pytest

from configs import quickstart
from kd_jax.main import distill, finetune, pretrain
from kd_jax.study.plan import Planner, Recipe, Student, recipes, students
from kd_jax.types import UserError

KEYS = {
    "prepare": lambda config: ("nlu", "sources", "tokenizer", "rows"),
    "pretrain": pretrain.keys,
    "distill": distill.keys,
    "finetune_dc": finetune.keys,
    "finetune_icner": finetune.keys,
    "evaluate": lambda config: ("prepared", "evaluate", "compute_dtype"),
}


def planner(**changes) -> Planner:
    config = quickstart.get_config()
    config.update(changes)
    return Planner(config, KEYS)


def all_stages(config):
    plan = Planner(config, KEYS)
    chosen = {(s.name, task): recipes(config)[0] for s in students(config) for task in config.study.tasks}
    return [*plan.teacher_stages(), *plan.before_recipes(), *plan.after_recipes(chosen)]


def test_both_baselines_are_always_compared():
    names = [student.name for student in students(quickstart.get_config())]
    assert names[0] == "scratch"
    assert "mlm-task" in names
    config = quickstart.get_config()
    config.study.mlm_sets = ()
    with pytest.raises(UserError, match=r"config\.study\.mlm_sets"):
        students(config)


def test_every_stage_comes_after_what_it_needs_and_folders_are_unique():
    stages = all_stages(quickstart.get_config())
    seen = set()
    for stage in stages:
        assert set(stage.needs) <= seen, stage.name
        seen.add(stage.folder)
    by_folder = {}
    for stage in stages:
        assert by_folder.setdefault(stage.folder, stage.name) == stage.name


def test_a_change_reaches_only_the_stages_that_depend_on_it():
    before = {stage.name: stage.folder for stage in all_stages(quickstart.get_config())}
    config = quickstart.get_config()
    config.distill.temperature = 4.0
    after = {stage.name: stage.folder for stage in all_stages(config)}
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all("distilled" in name for name in changed)
    config = quickstart.get_config()
    config.mesh.fsdp = 2
    config.distill.log_every = 1
    assert {stage.name: stage.folder for stage in all_stages(config)} == before


def test_student_size_leaves_the_teacher_alone():
    config = quickstart.get_config()
    config.student.num_layers = 1
    assert Planner(config, KEYS).teacher().folder == planner().teacher().folder


def test_mlm_baseline_sees_the_same_text_and_steps_as_the_distilled_student():
    plan = planner()
    mlm = plan.encoder(Student("mlm", "task"), 1)
    distilled = plan.encoder(Student("distilled", "task", "generic"), 1)
    assert mlm is not None and distilled is not None
    for key in ("transfer", "masking", "student", "seed", "prepared"):
        assert mlm.config[key] == distilled.config[key], key
    for key in ("steps", "batch_size", "learning_rate", "schedule", "weight_decay"):
        assert mlm.config.pretrain[key] == distilled.config.distill[key], key
    assert mlm.config.pretrain.model == "student"


def test_distillation_settings_are_the_same_for_all_transfer_sets():
    plan = planner()
    blocks = [plan.encoder(Student("distilled", name, "generic"), 0).config for name in ("generic", "mix50", "task")]
    assert len({str(block.distill) for block in blocks}) == 1
    assert [block.transfer.task_share for block in blocks] == [0.0, 0.5, 1.0]


def test_recipe_reaches_the_finetuning_stage():
    stage = planner().finetune(Student("scratch"), 2, "dc", Recipe(0.5, 7))
    assert (stage.config.finetune.learning_rate, stage.config.finetune.epochs, stage.config.seed) == (0.5, 7, 2)
    assert stage.config.finetune.init_from == ""


def test_share_outside_zero_to_one_names_the_key():
    config = quickstart.get_config()
    config.study.transfer_sets.mix50 = 1.5
    with pytest.raises(UserError, match=r"config\.study\.transfer_sets\.mix50: 1\.5"):
        Planner(config, KEYS)


def test_unknown_transfer_set_is_named():
    config = quickstart.get_config()
    config.study.adapted_sets = ("tusk",)
    with pytest.raises(UserError, match="'tusk' is no transfer set"):
        students(config)
