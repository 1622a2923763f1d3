"""Every key that kd_jax reads, with its unit or range and a default.

An experiment's file calls `get_config()` here, changes what it needs, and returns the result; library code never asks
for a key that is not declared here, and an override of an unknown key is an error.
"""

from ml_collections import ConfigDict

from kd_jax.models.encoder_config import PRESETS


def source(kind: str, format: str, languages: tuple[str, ...], **changes) -> ConfigDict:
    """One source of text of a kind, "generic" or "task", in some languages or locales, e.g. "de" or "de-DE"."""
    keys = ConfigDict(
        {
            "kind": kind,
            # embedded | text | jsonl | parquet | huggingface | tfds | utterances (the train partition of config.nlu)
            "format": format,
            "languages": tuple(languages),
            "path": "",  # file, folder or glob; {language} and ${VARIABLE} are filled in
            "field": "text",  # field that holds the text (jsonl, parquet, huggingface, tfds)
            "name": "",  # data set on the hub (or NAME@REVISION) or in TFDS; {language} is filled in
            "subset": "",  # its configuration on the hub; {language} is filled in
            "split": "train",  # its split
            "streaming": False,  # huggingface: read over the network as it goes
            "spoken_share": 0.0,  # in [0, 1]: share of texts brought to spoken form (lower case, no punctuation)
            "weight": 1.0,  # relative share among the sources of the same kind and language, > 0
            "max_texts": 0,  # texts read for each language; 0 reads all
        }
    )
    keys.update(changes)
    return keys


def job(**changes) -> ConfigDict:
    """What every training job has."""
    keys = ConfigDict(
        {
            "steps": 1000,  # optimizer steps
            "batch_size": 64,  # rows a step, or utterances a step when finetuning, over all devices
            "accumulation": 1,  # micro-batches a step; divides batch_size
            "learning_rate": 1e-3,  # peak
            "warmup_steps": 50,  # linear from 0
            "schedule": "linear",  # after warm-up: linear | cosine | constant
            "final_learning_rate": 0.0,  # what linear and cosine end at
            "weight_decay": 0.01,  # on matrices only, never on norms and biases
            "clip_norm": 1.0,  # global gradient norm; 0 turns clipping off
            "beta1": 0.9,
            "beta2": 0.98,
            "epsilon": 1e-6,
            "log_every": 20,  # steps
            "evaluate_every": 0,  # steps; 0 evaluates at the end only
            "evaluate_rows": 256,  # held-out rows a store at the most, masked-LM jobs
            "checkpoint_every": 200,  # steps; a checkpoint is always written at the end
            "keep_checkpoints": 2,
            # Steps a run whose loss is not finite and whose update is therefore skipped; one more ends it. 0: none.
            "skip_non_finite": 0,
        }
    )
    keys.update(changes)
    return keys


def term(weight: float, **more) -> ConfigDict:
    """A term of the distillation loss: its factor as a function of progress from 0 to 1, and what else it needs."""
    keys = ConfigDict(
        {
            "weight": weight,  # >= 0
            "final_weight": -1.0,  # the weight moves linearly to this; below 0 it stays as it is
            "begin": 0.0,  # progress at which it starts to move
            "end": 1.0,  # progress at which it arrives; the same as `begin` makes it a switch
        }
    )
    keys.update(more)
    return keys


def sharding(**changes) -> ConfigDict:
    """Kind of dimension of a parameter -> the mesh axis that it is cut along; several are joined by commas, and ""
    keeps it whole on every device."""
    keys = ConfigDict(
        {"vocab": "tensor", "embed": "fsdp", "heads": "tensor", "mlp": "tensor", "layers": "", "positions": ""}
    )
    keys.update(changes)
    return keys


def encoder(preset: str, **changes) -> ConfigDict:
    """The encoder keys of a named size (kd_jax/models/encoder_config.py); vocab_size 0 means the tokenizer's."""
    keys = ConfigDict(dict(PRESETS[preset]))
    keys.update(changes)
    return keys


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # student init, data order, dropout and finetuning
    config.prepared = ""  # folder that `prepare` wrote; every other command reads it

    # Labeled utterances of the task.
    config.nlu = ConfigDict(
        {
            "format": "embedded",  # embedded | massive | massive_parquet | huggingface
            "path": "",  # folder of <locale>.jsonl, the official tarball, or Parquet files; ${VARIABLE} is filled in
            "name": "",  # huggingface: data set on the hub, or NAME@REVISION
            "locales": ("en-US",),
            "max_train": 0,  # train utterances a locale, 0 keeps all; the same ids in every locale
        }
    )
    config.sources = ConfigDict()  # name -> source(...)
    config.tokenizer = ConfigDict(
        {
            "kind": "train",  # train | load
            "path": "",  # load: folder or hub name
            "model": "bpe",  # train: bpe | unigram
            "vocab_size": 8000,  # train: pieces, special tokens included
            "texts_per_store": 20000,  # train: texts read from each source and language
        }
    )
    config.rows = ConfigDict(
        {
            "length": 64,  # tokens a row, special tokens included
            "heldout_share": 0.02,  # in (0, 0.5]: of generic texts, by hash; of the task the dev partition is held out
            "open_rows": 64,  # rows kept open while packing
        }
    )
    # Generic text chosen for its likeness to the task's train utterances (docs/selection.md).
    config.select = ConfigDict(
        {
            "share": 0.0,  # in [0, 1]: of the texts of each generic source and language; 0 selects none
            "target": "language",  # language | all: likeness to the utterances of the text's language, or of all
            "ngrams": 2,  # longest n-gram of words that is counted, >= 1
            "buckets": 10_000,  # n-grams are hashed into so many, >= 2
            "smoothing": 0.1,  # > 0, weight of the uniform distribution beside the counted ones; 1 for few utterances
            "seed": 0,  # of the resampling, apart from config.seed, so that all seeds of a study see the same texts
        }
    )
    config.transfer = ConfigDict(
        {
            "task_share": 0.5,  # in [0, 1]: the rest is generic
            "generic": "generic",  # generic | selected: all generic text, or what config.select chose of it
            "unit": "tokens",  # tokens (maskable) | utterances: what the share is a share of
            "language_mix": "task",  # task | generic | own | uniform: whose language distribution both kinds follow
            "language_temperature": 1.0,  # p(language) ~ tokens ** temperature; 1 keeps the proportions, 0 is uniform
        }
    )
    config.masking = ConfigDict(
        {
            "seed": 0,  # apart from config.seed, so that seeds and students share masks
            "rate": 0.15,  # share of maskable tokens
            "mask_share": 0.8,  # of the masked: replaced by the mask token
            "random_share": 0.1,  # of the masked: replaced by a random piece; the rest is kept
            "epochs": 8,  # masks repeat after so many epochs of a store
        }
    )
    config.teacher = encoder("teacher_small")
    config.student = encoder("student_small")
    config.intermediate = encoder("student_base")  # the study's chains: distilled from the teacher, then a teacher
    config.teacher_checkpoint = ""  # distill: workdir of a pretrain or distill run; several are joined by commas
    config.teacher_cache = ""  # distill: workdir of a cache_teacher run; the teacher is then not loaded
    # The student's vocabulary: the tokenizer's, or only the pieces that the train rows use (the same for all students).
    config.vocabulary = ConfigDict(
        {
            "trim": False,
            "min_count": 1,  # occurrences in all train rows together that keep a piece
            "dropped": "renormalize",  # renormalize | unknown: where the teacher's mass on dropped pieces goes
        }
    )
    # What `cache_teacher` writes: predictions of config.teacher_checkpoint for the rows that these runs visit.
    config.cache = ConfigDict(
        {
            "task_shares": (),  # of the transfer sets; () takes config.transfer.task_share alone
            "generic": (),  # "generic" or "selected" for each task share; () takes config.transfer.generic for all
            "seeds": (),  # of the runs; () takes config.seed alone
            "steps": 0,  # of the runs; 0 takes config.distill.steps
            "batch_size": 0,  # of the runs; 0 takes config.distill.batch_size
            "temperature": 0.0,  # top_k, sampled: that of the runs; 0 takes config.distill.kl.temperature
            "format": "hidden",  # hidden (any temperature, exact) | top_k | sampled
            "dtype": "float16",  # of hidden states, log probabilities and sample weights: float16 | float32
            "k": 64,  # top_k: pieces a position
            "tail": "bucket",  # top_k: renormalize | bucket | zero: what stands for the other pieces
            "samples": 64,  # sampled: draws a position
            "power": 1.0,  # sampled: the proposal is p ** power, in (0, 1]
            "rows_per_part": 4096,  # rows a file; the parts are written, checked and resumed one by one
            "batch_rows": 64,  # rows the teacher predicts at a time
        }
    )
    config.cache_part = 0  # several machines may write one cache: this one writes every cache_parts-th part,
    config.cache_parts = 1  # beginning with cache_part

    # What `import_model` reads: a model of `transformers`, whose tokenizer config.prepared was made with.
    config.import_model = ConfigDict(
        {
            "path": "",  # folder with config.json and safetensors, or a name on the hub; ${VARIABLE} is filled in
            "revision": "",  # of a model on the hub: branch, tag or commit; empty takes its main branch
            "evaluate_rows": 256,  # held-out rows a store for the loss that the model comes with; 0 measures none
        }
    )

    config.pretrain = job()
    config.pretrain.model = "teacher"  # teacher | student: which encoder is trained
    config.pretrain.init_from = ""  # workdir of a pretrain run to continue from, with a fresh optimizer
    config.train_body = True  # pretrain: False trains the masked-LM head alone, without weight decay or the tied table
    config.adapt = (
        job()
    )  # the study's second stage for the adapted teacher: pretrain on task text from the generic teacher
    config.distill = job()
    # Terms of the loss; one whose weight is 0 throughout is not computed. See term() for the schedule of a weight.
    config.distill.kl = term(
        1.0,  # KL(teacher || student), scaled by temperature squared
        temperature=2.0,  # > 0, of both softmaxes
        final_temperature=0.0,  # moves linearly to this at the last step; 0 keeps `temperature`
    )
    config.distill.mlm = term(1.0)  # the hard masked-LM cross entropy
    config.distill.hidden = term(
        0.0,  # hidden states after matched layers, at every real token
        distance="cosine",  # cosine | mse
        layers="uniform",  # uniform | last | "0:3,1:7": pairs student:teacher, counted from 0 (-1 is the last)
        projection="auto",  # auto (where the widths differ) | always | never: a learned map to the teacher's width
    )
    config.distill.embeddings = term(0.0, distance="mse", projection="auto")  # before layer 0
    config.distill.relations = term(
        0.0,  # MiniLMv2: KL between scaled dot products among the queries, among the keys and among the values
        heads=0,  # relation heads, which must divide both widths; 0 takes the student's attention heads
        layers="last",  # as for hidden
        parts=("query", "key", "value"),
    )
    config.distill.kd_positions = "masked"  # masked | all: where the KL term is taken
    config.distill.block_positions = 0  # positions whose logits are formed at a time; 0 chooses
    config.distill.init = "random"  # random | teacher: the student starts from layers of the (first) teacher
    config.distill.init_layers = "uniform"  # init=teacher: uniform | first | last | "0,3": a teacher layer for each
    config.distill.teacher_steps = ()  # several teachers: () averages them; (0, n, ...) takes each from its step on

    config.chain = job()  # the study's chains: the job of the intermediate, with config.distill's terms

    config.finetune = job(batch_size=32)
    config.finetune.init_from = ""  # workdir of a distill or pretrain run; empty trains from scratch
    config.finetune.epochs = 0  # > 0 replaces steps: passes over the train utterances
    config.finetune.domain = (
        ""  # ICNER: one domain's model; empty takes all domains together; "each" trains one after the other
    )
    config.finetune.max_train = 0  # labeled train utterances a locale, the same ids in each; 0 takes all
    config.finetune.label_smoothing = 0.0  # in [0, 1)
    config.finetune.tag_weight = 1.0  # ICNER: weight of the tag loss beside the intent loss
    config.finetune.dropout = 0.1  # in the heads and the encoder while finetuning

    config.evaluate = ConfigDict(
        {
            "checkpoint": "",  # workdir of a finetune run
            "partition": "test",  # dev | test
            "mode": "strict",  # strict (IOB2 after repair) | massive (the official score)
            "batch_rows": 32,
        }
    )

    # What `export` writes for `transformers`: a student, or a DC or ICNER model (of one domain, or of all together).
    config.export = ConfigDict(
        {
            "checkpoint": "",  # workdir of a pretrain, distill, import_model or finetune run
            "int8": False,  # DC, ICNER: weights in int8 for `predict` and the program, not those for transformers
            "stablehlo": False,  # DC, ICNER: the compiled program too, which runs without kd_jax (needs flatbuffers)
            "results": "",  # workdir of the `evaluate` run whose test results the model card states; empty looks beside
        }
    )

    config.mesh = ConfigDict(
        {
            "data": -1,  # -1: the devices that are left
            "fsdp": 1,
            "tensor": 1,
            "slices": 0,  # TPU slices or nodes with a slower network between them; 0 asks the devices
        }
    )
    # What `latency` measures, for choosing a student: size, and the time of one and of 64 utterances.
    config.latency = ConfigDict(
        {
            "models": ("teacher", "student"),  # encoder blocks of this config: teacher, intermediate, student
            "task": "icner",  # dc | icner: whose heads they have
            "calls": 200,  # timed calls of each, >= 5
            "seconds": 20.0,  # for each and each number of utterances at the most
        }
    )
    # What `compile_check` compiles, for a machine that is not here.
    config.compile_check = ConfigDict(
        {
            "command": "distill",  # pretrain | distill (teacher in the loop) | cached (config.cache.format)
            "rows": 0,  # of a batch; 0 takes the job's batch_size
            "tries": 5,  # compilations to spend on the largest batch that fits
            "price": 0.0,  # of a device for an hour, in any currency; 0 leaves it at hours
        }
    )
    # Which parameters lie where: the frozen teacher and what is trained have a table each.
    config.sharding = ConfigDict({"teacher": sharding(), "student": sharding()})
    # With accumulation: the teacher predicts a step's whole batch before it is cut into micro-batches, so that its
    # parts are gathered once a step; that takes the memory of its forward pass over all rows.
    config.sharding.teacher_once = False
    config.compute_dtype = "auto"  # auto (float32 on CPU, bfloat16 elsewhere) | float32 | bfloat16
    config.progress = True  # progress bars on a terminal
    config.tensorboard = True
    # Anything may lie on gs:// or s3:// (docs/storage.md).
    config.storage = ConfigDict(
        {"local": ""}  # folder of this host for copies of it; empty takes kd_jax in $XDG_CACHE_HOME or ~/.cache
    )
    # Weights & Biases, which is imported only where a project is named.
    config.wandb = ConfigDict(
        {
            "project": "",  # empty: not used
            "entity": "",  # user or team; empty takes the account's default
            "group": "",  # e.g. the study that the run belongs to
            "mode": "online",  # online | offline (written to the run's directory, for `wandb sync`)
        }
    )
    # A step, an evaluation's batch or a wait for other processes that takes longer is reported, with the stacks of
    # all threads, on standard error and in stalled-<process>.txt of the run's directory.
    config.watchdog_seconds = 1800.0  # 0 turns it off; longer than the longest compilation
    config.watchdog_exit = False  # also ends the process then, with the exit code on which launchers start it again

    config.study = ConfigDict(
        {
            "name": "study",
            # A model of `transformers` as generic teacher (folder or name on the hub, as import_model.path, which the
            # study sets); config.tokenizer and config.teacher must be its. Empty pretrains config.teacher.
            "teacher_import": "",
            "train_head": True,  # imported: train its masked-LM head first, body at rest, with config.pretrain as job
            "transfer_sets": ConfigDict({"generic": 0.0, "mix50": 0.5, "task": 1.0}),  # name -> task_share
            "selected_sets": ConfigDict(),  # the same with selected generic text (config.select) in place of all
            "adapted_sets": ("task",),  # transfer sets also distilled from the adapted teacher,
            "schedule_sets": (),  # from the generic teacher and, from schedule_switch on, from the adapted one,
            "average_sets": (),  # from both, their probabilities averaged,
            "chain_sets": (),  # from config.intermediate, itself distilled from the generic teacher (config.chain)
            "schedule_switch": 0.5,  # progress, in (0, 1)
            "cache": True,  # students that share a teacher read its cached predictions, where the terms allow it
            "mlm_sets": ("task",),  # transfer sets also learned by MLM alone, without a teacher
            "seeds": (0, 1, 2),
            "tasks": ("dc", "icner"),
            "latency": True,  # measure size and latency of teacher and students, with config.latency
            "recipe_learning_rates": (1e-3,),  # searched on dev for each student, with the first seed
            "recipe_epochs": (10,),
            # Stop before distilling a teacher whose loss on task text is no better than a unigram's.
            "require_teacher_better_than_unigram": True,
        }
    )
    return config


JOBS = ("pretrain", "adapt", "distill", "chain", "finetune")


def smoke(config: ConfigDict) -> ConfigDict:
    """The same experiment at two steps a job, one seed and a tiny model: does every stage run?"""
    config.nlu.max_train = 200
    for name in config.sources:
        config.sources[name].max_texts = 200
    config.tokenizer.vocab_size = min(config.tokenizer.vocab_size, 600)
    config.rows.length = min(config.rows.length, 32)
    config.teacher = encoder("tiny")
    config.student = encoder("tiny")
    config.intermediate = encoder("tiny")
    for name in JOBS:
        config[name].update({"steps": 2, "batch_size": 8, "warmup_steps": 1, "log_every": 1, "evaluate_rows": 8})
    config.study.update({"seeds": (0,), "recipe_learning_rates": (1e-3,), "recipe_epochs": (0,)})
    config.study.require_teacher_better_than_unigram = False
    config.latency.calls = 5
    return config
