"""A synthetic study for the report's tests: invented error rates, no model behind them."""

import numpy as np

from kd_jax.config import base
from kd_jax.evaluation.results import results
from kd_jax.study.report.numbers import ReportInputs

DEFAULTS = base.get_config()
DOMAINS = ("alarm", "calendar", "lists", "music", "news", "weather")
LOCALES = ("de-DE", "en-US")
SHARES = {"generic": 0.0, "mix50": 0.5, "task": 1.0}
# (kind, transfer set, teacher) -> DC error rate, ICNER error rate, held-out task loss, held-out generic loss
STUDENTS = {
    ("scratch", "", ""): (0.20, 0.40, None, None),
    ("mlm", "task", ""): (0.17, 0.36, 4.64, 6.60),
    ("distilled", "generic", "generic"): (0.18, 0.37, 6.90, 5.70),
    ("distilled", "mix50", "generic"): (0.155, 0.33, 5.30, 5.85),
    ("distilled", "task", "generic"): (0.15, 0.25, 4.60, 6.30),
    ("distilled", "task", "adapted"): (0.14, 0.24, 4.35, 6.35),
}

LATENCY = {
    "task": "icner",
    "length": 64,
    "dtype": "float32",
    "device": "cpu",
    "cores": 2,
    "models": [
        {
            "name": name,
            "layers": layers,
            "hidden_size": hidden,
            "vocabulary": 4000,
            "parameters": parameters,
            "without_embeddings": parameters - 4000 * hidden,
            "bytes": {"float32": 4 * parameters, "int8": parameters + 5000},
            "batches": [
                {"utterances": count, "rows": rows, "calls": 200, "p50_ms": factor * time, "p95_ms": factor * time + 1}
                for count, rows, time in ((1, 1, 2.0), (64, 11, 8.0))
            ],
        }
        for name, layers, hidden, parameters, factor in (
            ("teacher", 3, 192, 1_768_000, 3.0),
            ("student", 2, 96, 584_000, 1.0),
        )
    ],
}


def dc_record(number: int, locale: str, domain: str, right: bool) -> dict:
    return {
        "id": str(number),
        "locale": locale,
        "domain": domain,
        "intent": f"{domain}_query",
        "partition": "test",
        "test_sets": ["test", *(["test_unseen"] if number % 2 else []), *(["tail"] if number % 5 == 0 else [])],
        "task": "dc",
        "words": ["a"],
        "predicted_domain": domain if right else "other",
    }


def icner_record(number: int, locale: str, domain: str, intent_right: bool, slot_right: bool) -> dict:
    common = {key: value for key, value in dc_record(number, locale, domain, True).items() if key != "predicted_domain"}
    return {
        **common,
        "task": "icner",
        "gold_tags": ["B-x"],
        "predicted_intent": common["intent"] if intent_right else "other",
        "predicted_tags": ["B-x" if slot_right else "O"],
        "gold_slots": 1,
        "correct": int(slot_right),
        "substitutions": 0,
        "insertions": 0,
        "deletions": int(not slot_right),
        "exact": intent_right and slot_right,
    }


def records_of(task: str, rate: float, seed: int, shift: dict[str, float], size: int) -> list[dict]:
    """Records whose errors fall on the same hard utterances for all students, with a little noise by seed."""
    rng = np.random.default_rng(100 * seed + (task == "dc"))
    difficulty = np.random.default_rng(7).random((size, len(LOCALES), 2)) + 0.03 * rng.standard_normal(
        (size, len(LOCALES), 2)
    )
    rows = []
    for number in range(size):
        domain = DOMAINS[number % len(DOMAINS)]
        for column, locale in enumerate(LOCALES):
            right = difficulty[number, column] > rate * (1 + shift.get(domain, 0.0))
            if task == "dc":
                rows.append(dc_record(number, locale, domain, bool(right[0])))
            else:
                rows.append(icner_record(number, locale, domain, bool(right[0]), bool(right[1])))
    return rows


def heldout_rows(who: dict, loss: dict[str, float]) -> list[dict]:
    rows = []
    for kind, value in loss.items():
        languages = LOCALES if kind == "task" else tuple(locale[:2] for locale in LOCALES)
        for offset, language in enumerate(("all", *languages)):
            found = {
                "loss": value + 0.1 * offset,
                "accuracy": max(0.02, 0.8 - value / 9),
                "unigram_loss": (6.7 if who["student"] == "teacher" else 6.1) + 0.05 * offset,
            }
            for metric, number in found.items():
                scope = "all" if language == "all" else "locale"
                place = {"scope": scope, "locale": language, "domain": "all", "test_set": f"heldout_{kind}"}
                rows.append({**who, "task": "mlm", **place, "metric": metric, "value": number, "count": 1000})
    return rows


def synthetic_inputs(
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    tasks: tuple[str, ...] = ("dc", "icner"),
    students: dict | None = None,
    size: int = 240,
    with_records: bool = True,
) -> ReportInputs:
    """A whole study; every number in it is invented."""
    objects, records, curves, recipes = [], {}, {}, []
    for kind, set_name, teacher in STUDENTS if students is None else students:
        dc, icner, task_loss, generic_loss = STUDENTS[kind, set_name, teacher]
        name = "-".join(part for part in (kind, set_name, teacher) if part)
        # Task text helps the domains at the end of the list more.
        strength = -0.5 * SHARES.get(set_name, 0.0) if kind == "distilled" else 0.0
        shift = {domain: strength * (index - 2) / len(DOMAINS) for index, domain in enumerate(DOMAINS)}
        for seed in seeds:
            who = {"student": kind, "transfer_set": set_name, "teacher": teacher, "seed": seed}
            if task_loss is not None:
                wobble = 0.02 * np.random.default_rng(len(objects)).standard_normal(2)
                objects += heldout_rows(who, {"task": task_loss + wobble[0], "generic": generic_loss + wobble[1]})
                steps = range(0, 260, 20)
                curves[f"{name}, seed {seed}"] = [
                    {
                        "step": step,
                        "mlm": task_loss + (8.3 - task_loss) * np.exp(-step / 60) + 0.03 * seed,
                        "loss": 20.0,
                    }
                    for step in steps
                ]
            for task in tasks:
                found = records_of(task, dc if task == "dc" else icner, seed, shift, size)
                objects += results(found, identity=who)
                if with_records:
                    records[kind, set_name, teacher, seed, task] = found
        for task in tasks:
            for rate, score in ((1e-3, 0.80), (3e-3, 0.82)):
                chosen = rate == 3e-3
                recipe = {"student": name, "task": task, "learning_rate": rate, "epochs": 4, "pooling": "mean"}
                recipes.append({**recipe, "dev_score": score, "chosen": chosen})
    for name, loss in (("generic", {"task": 6.6, "generic": 5.2}), ("adapted", {"task": 4.2, "generic": 5.9})):
        objects += heldout_rows({"student": "teacher", "transfer_set": "", "teacher": name, "seed": 0}, loss)
        start = 8.3 if name == "generic" else 7.0
        curves[f"teacher, {name}"] = [
            {"step": step, "mlm": 5 + (start - 5) * np.exp(-step / 200)} for step in range(0, 900, 60)
        ]
    return ReportInputs(
        name="Synthetic study",
        config={
            "teacher": {"num_layers": 3, "hidden_size": 192},
            "student": {"num_layers": 2, "hidden_size": 96},
            **{
                job: {**DEFAULTS[job].to_dict(), "steps": 100, "batch_size": 32, "learning_rate": 1e-3}
                for job in ("pretrain", "adapt", "distill")
            },
            "finetune": {"max_train": 1151},
            "study": {**DEFAULTS.study.to_dict(), "seeds": list(seeds)},
        },
        provenance={
            "command_line": "python -m kd_jax.main.study --config=configs/quickstart.py",
            "commit": None,
            "packages": {"jax": "0.0.0", "numpy": "0.0.0"},
            "config": "0123456789ab",
            "seconds": {
                "prepare": 12.0,
                "pretrain-teacher": 100.0,
                "dc-scratch-seed0": 5.5,
                "test-dc-scratch-seed0": float("nan"),
            },
        },
        results=objects,
        records=records,
        task_shares=SHARES,
        realized={name: described(share) for name, share in SHARES.items()},
        curves=curves,
        similarity=[
            {
                "domain": domain,
                "jsd": 0.3 + 0.05 * index,
                "jsd_matched": 0.25 + 0.04 * index,
                "overlap": 0.5,
                "tokens": 1000 + index,
            }
            for index, domain in enumerate(DOMAINS)
        ],
        recipes=recipes,
        notes=["This study is synthetic: its numbers are invented for tests."],
        latency=LATENCY,
    )


def described(share: float) -> dict:
    """What TransferSet.describe says of a set, for two stores."""

    def entry(part: float, unique: int) -> dict:
        tokens = round(512_000 * part)
        return {
            "rows": round(8000 * part),
            "tokens": tokens,
            "tokens_share": part,
            "epochs": tokens / unique,
            "unique_tokens": min(tokens, unique),
            "cut_share": 0.02,
        }

    kinds = {"generic": entry(1 - share, 2_000_000), "task": entry(share, 60_000)}
    return {"rows": 8000, "stores": {f"{kind}-en": value for kind, value in kinds.items()}, "kinds": kinds}
