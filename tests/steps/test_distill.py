"""The distillation step: every term by itself, teachers averaged, trimmed vocabularies, and cached predictions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.config.training import KL, Embeddings, Hidden, Relations, Sentence, Term
from kd_jax.losses.features import hidden_distance, relation_divergence
from kd_jax.models.projection import WithProjections
from kd_jax.steps.distill import MEANS, STATES, DistillSettings, make_distill_objective, real_tokens
from kd_jax.steps.teacher_logits import TeacherForm, on_kept
from kd_jax.steps.teacher_predictions import make_prediction_step
from kd_jax.steps.teacher_states import make_states_step
from tests.steps.test_train_step import VOCABULARY, distillation, one_step, tiny, uneven_batch

NOTHING = {"kl": KL(0.0), "mlm": Term(0.0)}
KL_ALONE = DistillSettings(mlm=Term(0.0))


def softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    p = np.exp(scaled - scaled.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def masked_logits(model, params, batch):
    hidden = model.hidden(params, batch)
    places = jnp.asarray(batch["masked_positions"])[:, :, None]
    return np.asarray(model.mlm_logits(params, jnp.take_along_axis(hidden, places, axis=1)))


def kl_of(p, q, weights):
    return float((np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / q), 0).sum(-1) * weights).sum())


@pytest.fixture(scope="module")
def models():
    """(student, its parameters, teacher, its parameters, batch)."""
    student, teacher = tiny(initializer_range=0.3), tiny(num_layers=3, initializer_range=0.3)
    return (
        student,
        jax.jit(student.init)(jax.random.key(0)),
        teacher,
        jax.jit(teacher.init)(jax.random.key(1)),
        uneven_batch(),
    )


def test_kl_is_that_of_the_two_models_logits(models):
    student, params, teacher, theirs, batch = models
    _, metrics = one_step(distillation(student, teacher, KL_ALONE), params, {"teachers": (theirs,)}, batch)
    p, q = softmax(masked_logits(teacher, theirs, batch), 2.0), softmax(masked_logits(student, params, batch), 2.0)
    np.testing.assert_allclose(metrics["kl"][0], 4 * kl_of(p, q, batch["masked_weights"]), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"][0], metrics["kl"][0] / batch["masked_weights"].sum(), rtol=1e-6)


def test_several_teachers_average_their_probabilities(models):
    student, params, teacher, theirs, batch = models
    other = jax.jit(teacher.init)(jax.random.key(2))
    objective = make_distill_objective(WithProjections(student, ()), (teacher, teacher), KL_ALONE)
    _, metrics = one_step(objective, params, {"teachers": (theirs, other)}, batch)
    p = (softmax(masked_logits(teacher, theirs, batch), 2.0) + softmax(masked_logits(teacher, other, batch), 2.0)) / 2
    q = softmax(masked_logits(student, params, batch), 2.0)
    np.testing.assert_allclose(metrics["kl"][0], 4 * kl_of(p, q, batch["masked_weights"]), rtol=1e-4)


def test_temperature_moves_linearly(models):
    student, params, teacher, theirs, batch = models
    moving = dataclasses.replace(KL_ALONE, kl=KL(1.0, temperature=1.0, final_temperature=3.0))
    objective = distillation(student, teacher, moving)
    frozen, scales = {"teachers": (theirs,)}, {"kl": jnp.float32(1.0)}
    for progress, temperature in ((0.0, 1.0), (0.5, 2.0), (1.0, 3.0)):
        _, terms = objective.loss(params, frozen, batch, None, scales, jnp.float32(progress))
        p, q = (softmax(masked_logits(*one, batch), temperature) for one in ((teacher, theirs), (student, params)))
        expected = temperature**2 * kl_of(p, q, batch["masked_weights"])
        np.testing.assert_allclose(terms["kl"][0], expected, rtol=1e-4)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_hidden_states_go_through_their_projections(models, distance):
    _, _, _, _, batch = models
    student, teacher = tiny(hidden_size=16, initializer_range=0.3), tiny(num_layers=3, initializer_range=0.3)
    wider = WithProjections(student, (("hidden_0", 16, 32), ("hidden_1", 16, 32), ("embeddings", 16, 32)))
    params, theirs = jax.jit(wider.init)(jax.random.key(0)), jax.jit(teacher.init)(jax.random.key(1))
    settings = DistillSettings(
        **NOTHING,
        hidden=Hidden(1.0, distance=distance),
        embeddings=Embeddings(1.0),
        hidden_layers=((0, 0), (1, 2)),
    )
    objective = make_distill_objective(wider, (teacher,), settings)
    state, metrics = one_step(objective, params, {"teachers": (theirs,)}, batch)
    ours = student.capture(wider.student_params(params), batch, layers=(0, 1), embeddings=True)
    goal = teacher.capture(theirs, batch, layers=(0, 2), embeddings=True)
    weights = real_tokens(batch)
    expected = sum(
        float(
            hidden_distance(wider.project(params, f"hidden_{n}", ours.layers[a]), goal.layers[b], weights, distance)[0]
        )
        for n, (a, b) in enumerate(((0, 0), (1, 2)))
    )
    np.testing.assert_allclose(metrics["hidden"][0], expected / 2, rtol=1e-4)
    assert float(metrics["hidden"][1]) == weights.sum()
    mse, _ = hidden_distance(wider.project(params, "embeddings", ours.embeddings), goal.embeddings, weights, "mse")
    np.testing.assert_allclose(metrics["embeddings"][0], mse, rtol=1e-4)
    moved = [
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(state["params"]["projections"]), jax.tree.leaves(params["projections"]))
    ]
    assert min(moved) > 0


def of_texts(states, segment_ids):
    """The mean state of each text, in the order of rows and segments, float64."""
    states = np.asarray(states, np.float64)
    texts = [(row, segment) for row in range(len(states)) for segment in range(1, segment_ids[row].max() + 1)]
    return np.stack([states[row, segment_ids[row] == segment].mean(axis=0) for row, segment in texts])


@pytest.mark.parametrize("also", ["clean", "masked", "kl"])
def test_the_sentence_term_compares_the_mean_states_of_texts(models, also):
    _, _, _, _, batch = models
    student, teacher = tiny(hidden_size=16, initializer_range=0.3), tiny(num_layers=3, initializer_range=0.3)
    wider = WithProjections(student, (("sentence", 16, 32),))
    params, theirs = jax.jit(wider.init)(jax.random.key(0)), jax.jit(teacher.init)(jax.random.key(1))
    terms = {**NOTHING, "kl": KL(1.0)} if also == "kl" else NOTHING
    settings = DistillSettings(**terms, sentence=Sentence(0.5), clean=also == "clean")
    rows = {name: batch[name] for name in ("tokens", "segment_ids", "positions")} if also == "clean" else batch
    objective = make_distill_objective(wider, (teacher,), settings)
    state, metrics = one_step(objective, params, {"teachers": (theirs,)}, rows)
    segment_ids = batch["segment_ids"]
    ours = of_texts(student.hidden(wider.student_params(params), batch), segment_ids)
    ours = ours @ np.asarray(params["projections"]["sentence"]["kernel"], np.float64)
    goal = of_texts(teacher.hidden(theirs, batch), segment_ids)
    cosine = (ours * goal).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(goal, axis=-1)
    np.testing.assert_allclose(metrics["sentence"][0], (1 - cosine).sum(), rtol=1e-4)
    assert float(metrics["sentence"][1]) == len(ours) == segment_ids.max(axis=1).sum()
    if also != "kl":
        np.testing.assert_allclose(metrics["loss"][0], 0.5 * (1 - cosine).mean(), rtol=1e-4)
        assert np.abs(state["params"]["projections"]["sentence"]["kernel"]).max() > 0
    else:  # the other term is as it is alone
        alone = distillation(student, teacher, KL_ALONE)
        _, expected = one_step(alone, wider.student_params(params), {"teachers": (theirs,)}, batch)
        np.testing.assert_allclose(metrics["kl"][0], expected["kl"][0], rtol=1e-5)
    assert set(metrics) >= {"sentence", "loss"} and ("accuracy" in metrics) == (also != "clean")


def test_for_unmasked_text_the_last_states_are_after_the_final_norm(models):
    student, params, teacher, theirs, batch = models
    assert student.config.final_norm
    settings = DistillSettings(
        **NOTHING, hidden=Hidden(1.0, distance="mse"), hidden_layers=((0, 0), (1, 2)), clean=True
    )
    clean = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    _, metrics = one_step(distillation(student, teacher, settings), params, {"teachers": (theirs,)}, clean)
    ours, goal = student.capture(params, batch, layers=(0,)), teacher.capture(theirs, batch, layers=(0,))
    pairs = ((ours.layers[0], goal.layers[0]), (ours.hidden, goal.hidden))
    expected = sum(float(hidden_distance(*pair, real_tokens(batch), "mse")[0]) for pair in pairs)
    np.testing.assert_allclose(metrics["hidden"][0], expected / 2, rtol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_cached_states_give_the_step_of_the_teacher_in_the_loop(models, accumulation):
    _, _, _, _, batch = models
    student, teacher = tiny(hidden_size=16, initializer_range=0.3), tiny(num_layers=3, initializer_range=0.3)
    names = ("hidden_0", "hidden_1", "sentence")
    wider = WithProjections(student, tuple((name, 16, 32) for name in names))
    params, theirs = jax.jit(wider.init)(jax.random.key(0)), jax.jit(teacher.init)(jax.random.key(1))
    settings = DistillSettings(
        **NOTHING, hidden=Hidden(1.0), sentence=Sentence(1.0), clean=True, hidden_layers=((0, 0), (1, 2))
    )
    clean = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    loop = make_distill_objective(wider, (teacher,), settings)
    expected, in_the_loop = one_step(loop, params, {"teachers": (theirs,)}, clean, accumulation)
    states, means = make_states_step(teacher, (0, 2), 2, "float32")(theirs, clean)
    values = {STATES.format(layer): one for layer, one in zip((0, 2), states)} | {MEANS: means}
    form = TeacherForm("states", cached=True)
    objective = make_distill_objective(wider, (), dataclasses.replace(settings, form=form))
    found, metrics = one_step(objective, params, {}, clean | jax.tree.map(np.asarray, values), accumulation)
    for name in ("loss", "hidden", "sentence"):
        np.testing.assert_allclose(metrics[name][0], in_the_loop[name][0], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(found["params"]), jax.tree.leaves(expected["params"]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_centered_states_have_their_mean_subtracted(models):
    _, _, _, _, batch = models
    student, teacher = tiny(hidden_size=16, initializer_range=0.3), tiny(num_layers=3, initializer_range=0.3)
    wider = WithProjections(student, (("hidden_0", 16, 32), ("sentence", 16, 32)))
    params, theirs = jax.jit(wider.init)(jax.random.key(0)), jax.jit(teacher.init)(jax.random.key(1))
    clean = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    states, means = make_states_step(teacher, (2,), 2, "float32")(theirs, clean)
    values = {STATES.format(2): np.asarray(states[0]), MEANS: np.asarray(means)}
    centers = {name: np.linspace(-0.1, number, 32, dtype=np.float32) for number, name in enumerate(values, 1)}

    def step_of(center, frozen, values):
        settings = DistillSettings(
            **NOTHING,
            hidden=Hidden(1.0),
            sentence=Sentence(1.0),
            clean=True,
            center=center,
            hidden_layers=((1, 2),),
            form=TeacherForm("states", cached=True),
        )
        objective = make_distill_objective(wider, (), settings)
        return one_step(objective, params, frozen, clean | values, 1)

    moved = {name: one - centers[name] for name, one in values.items()}
    (_, found), (_, expected) = step_of(True, {"centers": centers}, values), step_of(False, {}, moved)
    _, plain = step_of(False, {}, values)
    for name in ("loss", "hidden", "sentence"):
        np.testing.assert_allclose(found[name][0], expected[name][0], rtol=1e-6)
        assert abs(found[name][0] - plain[name][0]) > 0.01


def test_relations_with_other_head_counts(models):
    student, params, _, _, batch = models
    teacher = tiny(num_layers=3, hidden_size=48, num_heads=3, initializer_range=0.3)
    theirs = jax.jit(teacher.init)(jax.random.key(1))
    settings = DistillSettings(
        **NOTHING,
        relations=Relations(1.0, parts=("query", "value")),
        relation_heads=8,
        relation_layers=((1, 2),),
    )
    _, metrics = one_step(distillation(student, teacher, settings), params, {"teachers": (theirs,)}, batch)
    ours = student.capture(params, batch, projections=(1,)).projections[1]
    goal = teacher.capture(theirs, batch, projections=(2,)).projections[2]
    expected = [float(relation_divergence(ours[n], goal[n], batch["segment_ids"], 8)[0]) for n in (0, 2)]
    np.testing.assert_allclose(metrics["relations"][0], sum(expected) / 2, rtol=1e-4)


def test_terms_of_weight_zero_leave_no_trace_in_the_program(models):
    student, params, teacher, theirs, batch = models
    frozen = {"teachers": (theirs,), "seed": np.int32(0)}

    def operations(settings, frozen=frozen):
        objective = distillation(student, teacher, settings)
        scales = {name: jnp.float32(1.0) for name in settings.used}
        traced = jax.jit(lambda params, frozen: objective.loss(params, frozen, batch, None, scales, 0.5))
        return str(traced.trace(params, frozen).jaxpr).count("dot_general")

    plain = operations(KL_ALONE)
    with_relations = operations(
        dataclasses.replace(KL_ALONE, relations=Relations(1.0), relation_heads=2, relation_layers=((1, 2),))
    )
    unused = operations(
        dataclasses.replace(KL_ALONE, relations=Relations(0.0), relation_heads=2, relation_layers=((1, 2),))
    )
    assert plain == unused < with_relations
    # Without any term on the teacher it is not run either, so its parameters may be absent.
    assert operations(DistillSettings(kl=KL(0.0)), {"teachers": ()}) < plain


def test_mass_on_dropped_pieces_goes_where_the_config_says():
    logits = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    kept = np.array([0, 2, 3, 6], np.int32)
    for temperature in (1.0, 2.0):
        p = softmax(logits, temperature)
        renormalized = on_kept(jnp.asarray(logits), kept, jnp.float32(temperature), TeacherForm())
        np.testing.assert_allclose(
            softmax(renormalized, temperature), p[:, kept] / p[:, kept].sum(-1, keepdims=True), rtol=1e-5
        )
        form = TeacherForm(dropped="unknown", unknown=1)
        expected = p[:, kept].copy()
        expected[:, 1] += p[:, [1, 4, 5]].sum(-1)
        found = softmax(on_kept(jnp.asarray(logits), kept, jnp.float32(temperature), form), temperature)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dropped", ["renormalize", "unknown"])
def test_a_trimmed_student_sees_the_teacher_on_its_own_pieces(models, dropped):
    _, _, teacher, theirs, batch = models
    kept = np.sort(np.random.default_rng(3).permutation(VOCABULARY)[:40]).astype(np.int32)
    student = tiny(vocab_size=40, initializer_range=0.3)
    params = jax.jit(student.init)(jax.random.key(0))
    # The teacher reads a dropped token as itself; the student reads <unk>.
    full = batch["tokens"]
    tokens = np.where(np.isin(full, kept), np.searchsorted(kept, full), 3).astype(np.int32)
    assert (kept[tokens] != full).any()
    ours = {**batch, "tokens": tokens, "teacher_tokens": full, "masked_targets": batch["masked_targets"] % 40}
    form = TeacherForm(dropped=dropped, unknown=3)
    settings = dataclasses.replace(KL_ALONE, form=form)
    _, metrics = one_step(distillation(student, teacher, settings), params, {"teachers": (theirs,), "kept": kept}, ours)
    logits = masked_logits(teacher, theirs, {**ours, "tokens": full})
    p = softmax(on_kept(jnp.asarray(logits), kept, jnp.float32(2.0), form), 2.0)
    q = softmax(masked_logits(student, params, ours), 2.0)
    np.testing.assert_allclose(metrics["kl"][0], 4 * kl_of(p, q, batch["masked_weights"]), rtol=1e-4)


@pytest.mark.parametrize("where, trimmed", [("masked", False), ("all", True)])
def test_fused_logits_give_the_same_step(models, where, trimmed):
    student, params, teacher, theirs, batch = models
    frozen = {"teachers": (theirs,)}
    if trimmed:
        student = tiny(vocab_size=40, initializer_range=0.3)
        params, kept = jax.jit(student.init)(jax.random.key(0)), np.arange(0, 2 * 40, 2) % VOCABULARY
        frozen["kept"] = np.sort(kept).astype(np.int32)
        small = {name: np.minimum(batch[name], 39) for name in ("tokens", "masked_targets")}
        batch = {**batch, **small, "teacher_tokens": batch["tokens"]}
    plain = DistillSettings(kd_positions=where)
    expected, terms = one_step(distillation(student, teacher, plain), params, frozen, batch)
    fused = dataclasses.replace(plain, fused=True)
    state, metrics = one_step(distillation(student, teacher, fused), params, frozen, batch)
    for name in ("loss", "kl", "mlm", "accuracy", "grad_norm"):
        np.testing.assert_allclose(metrics[name][0], terms[name][0], rtol=2e-5, err_msg=name)
    for one, other in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(expected["params"]), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_kernels_are_used_for_the_terms_they_support(models):
    student, params, teacher, theirs, batch = models
    other = jax.jit(teacher.init)(jax.random.key(2))
    scales = {"kl": jnp.float32(1.0), "mlm": jnp.float32(1.0)}

    def kernels(batch=batch, frozen=None, teachers=(teacher,), **changes):
        objective = make_distill_objective(WithProjections(student, ()), teachers, DistillSettings(**changes))
        frozen = frozen or {"teachers": (theirs, other)[: len(teachers)]}
        of = jax.make_jaxpr(lambda p: objective.loss(p, frozen, batch, None, scales, jnp.float32(0.0))[0])
        return "pallas_call[" in str(of(params))

    assert kernels(fused=True)
    assert not kernels()
    assert not kernels(teachers=(teacher, teacher), fused=True)
    with_hidden, _ = cached(teacher, theirs, batch, format="hidden")
    decoder = {"decoder": teacher.decoder(theirs)}
    assert kernels(with_hidden, decoder, (), fused=True, form=TeacherForm(cached=True))
    with_values, _ = cached(teacher, theirs, batch, format="top_k", k=4)
    assert not kernels(with_values, {"none": ()}, (), fused=True, form=TeacherForm("top_k", cached=True))
    unknown = {"teachers": (theirs,), "kept": np.arange(VOCABULARY, dtype=np.int32)}
    form = TeacherForm(dropped="unknown")
    assert not kernels({**batch, "teacher_tokens": batch["tokens"]}, unknown, fused=True, form=form)


def cached(teacher, theirs, batch, **settings):
    """The batch with the teacher's values beside it, and the frozen part, as the cache gives them."""
    values = {"dtype": "float32", "temperature": 2.0, **settings}
    uniforms = np.random.default_rng(5).random((*batch["masked_positions"].shape, 64)).astype(np.float32)
    step = make_prediction_step(teacher, TeacherForm(), values)
    fields, mass = step(theirs, {}, {**batch, "uniforms": uniforms})
    return {**batch, **{f"teacher_{name}": value for name, value in fields.items()}}, mass


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_training_from_float32_hidden_or_all_pieces_equals_the_teacher_in_the_loop(models, kind):
    student, params, teacher, theirs, batch = models
    settings = dataclasses.replace(KL_ALONE, mlm=Term(1.0))
    expected, in_the_loop = one_step(distillation(student, teacher, settings), params, {"teachers": (theirs,)}, batch)
    with_values, mass = cached(teacher, theirs, batch, format=kind, k=VOCABULARY)
    np.testing.assert_allclose(mass, 1.0, rtol=1e-5)
    for tail in ("renormalize", "bucket", "zero") if kind == "top_k" else ("",):
        form = TeacherForm(kind, tail, cached=True)
        objective = make_distill_objective(WithProjections(student, ()), (), dataclasses.replace(settings, form=form))
        frozen = {"decoder": teacher.decoder(theirs)} if kind == "hidden" else {}
        state, metrics = one_step(objective, params, frozen, with_values)
        for name in ("loss", "kl", "mlm", "accuracy"):
            np.testing.assert_allclose(metrics[name][0], in_the_loop[name][0], rtol=2e-5, err_msg=f"{name} {tail}")
        for one, other in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(expected["params"])):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_an_untied_decoder_replaces_the_token_table(models):
    batch = models[-1]
    own = {"tied_decoder": False, "initializer_range": 0.3}
    student, teacher = tiny(**own), tiny(num_layers=3, **own)
    params, theirs = jax.jit(student.init)(jax.random.key(0)), jax.jit(teacher.init)(jax.random.key(1))
    settings = dataclasses.replace(KL_ALONE, mlm=Term(1.0))
    state, metrics = one_step(distillation(student, teacher, settings), params, {"teachers": (theirs,)}, batch)
    p, q = softmax(masked_logits(teacher, theirs, batch), 2.0), softmax(masked_logits(student, params, batch), 2.0)
    np.testing.assert_allclose(metrics["kl"][0], 4 * kl_of(p, q, batch["masked_weights"]), rtol=1e-4)
    unread = np.setdiff1d(np.arange(VOCABULARY), batch["tokens"])
    before, after = (np.asarray(tree["encoder"]["embeddings"]["tokens"])[unread] for tree in (params, state["params"]))
    np.testing.assert_array_equal(after, before)
    assert np.abs(np.asarray(state["params"]["mlm_head"]["decoder"] - params["mlm_head"]["decoder"])).min(0).max() > 0
    with_values, _ = cached(teacher, theirs, batch, format="hidden")
    form = TeacherForm("hidden", cached=True)
    objective = make_distill_objective(WithProjections(student, ()), (), dataclasses.replace(settings, form=form))
    _, found = one_step(objective, params, {"decoder": teacher.decoder(theirs)}, with_values)
    np.testing.assert_allclose(found["kl"][0], metrics["kl"][0], rtol=2e-5)


def test_top_k_tells_how_much_mass_it_holds(models):
    _, _, teacher, theirs, batch = models
    p = np.sort(softmax(masked_logits(teacher, theirs, batch), 2.0))[..., ::-1]
    _, mass = cached(teacher, theirs, batch, format="top_k", k=4)
    np.testing.assert_allclose(mass, p[..., :4].sum(-1), rtol=1e-4)


def test_sampled_predictions_estimate_the_same_loss(models):
    student, params, teacher, theirs, batch = models
    _, metrics = one_step(distillation(student, teacher, KL_ALONE), params, {"teachers": (theirs,)}, batch)
    with_values, _ = cached(teacher, theirs, batch, format="sampled", samples=64, power=1.0)
    form = TeacherForm("sampled", cached=True)
    objective = make_distill_objective(WithProjections(student, ()), (), dataclasses.replace(KL_ALONE, form=form))
    _, found = one_step(objective, params, {}, with_values)
    exact, estimate = float(metrics["kl"][0]), float(found["kl"][0])
    assert estimate != exact
    assert abs(estimate - exact) < 0.5 * abs(exact)
