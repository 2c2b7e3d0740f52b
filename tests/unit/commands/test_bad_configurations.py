"""Configurations that `train` refuses: what was found, what is required, and nothing written."""

import pytest

from kimi_jax import train

OVERRIDES = {
    "unknown key": (
        ["train.learning_rat=1e-3"],
        ["train.learning_rat: unknown key; did you mean learning_rate?"],
    ),
    "unknown key, nothing near": (["run.zzz=1"], ["run.zzz: unknown key; known here: dir, seed"]),
    "unknown section": (["trian.steps=3"], ["trian: unknown key; did you mean train?"]),
    "text for a number": (
        ["train.steps=many"],
        ["train.steps: Input should be a valid integer", "found 'many'"],
    ),
    "number for text": (["data.train=7"], ["data.train: Input should be a valid string; found 7"]),
    "fraction of a row": (
        ["train.micro_batch=1.5"],
        ["train.micro_batch: Input should be a valid integer", "1.5"],
    ),
    "no step": (
        ["train.steps=0"],
        ["train.steps: Input should be greater than or equal to 1; found 0"],
    ),
    "negative rate": (
        ["train.learning_rate=-1"],
        ["train.learning_rate: Input should be greater than 0; found -1"],
    ),
    "rate not a number": (
        ["train.learning_rate=.nan"],
        ["train.learning_rate: Input should be", "found nan"],
    ),
    "rate null": (
        ["train.learning_rate="],
        ["train.learning_rate: Input should be a valid number; found None"],
    ),
    "dtype": (
        ["model.dtype=float16"],
        ["model.dtype: Input should be 'float32' or 'bfloat16'; found 'float16'"],
    ),
    "several at once": (
        ["train.steps=0", "lora.rank=-2", "model.dtypes=float32"],
        [
            "3 problems",
            "train.steps",
            "lora.rank",
            "model.dtypes: unknown key; did you mean dtype?",
        ],
    ),
    "no target": (["lora.targets=[]"], ["lora.targets: List should have at least 1 item"]),
    "target matches nothing": (
        ["lora.targets=[attention, q_a_prj, mlp.expert.*]"],
        [
            "lora.targets: nothing to adapt",
            "'q_a_prj' matches no weight of this checkpoint; did you mean 'q_a_proj'?",
            "'mlp.expert.*' matches no weight",
        ],
    ),
    "target is frozen": (
        ["lora.targets=[mlp.gate.*, embed_tokens]"],
        [
            "'mlp.gate.*' matches only mlp.gate.e_score_correction_bias, mlp.gate.weight",
            "'embed_tokens' matches only embed_tokens: routers, norms and the embedding stay frozen",
        ],
    ),
    "warm-up too long": (
        ["train.warmup_steps=4"],
        ["warmup_steps is 4; it must be less than steps, 4"],
    ),
    "evaluation without rows": (
        ["evaluate.loss_every=2", "evaluate.sample_every=2"],
        [
            "held-out rows are needed for evaluate.loss_every and evaluate.sample_every: set data.eval"
        ],
    ),
    "pattern": (
        ["evaluate.pattern='(unclosed'"],
        ["evaluate.pattern: not a regular expression: missing )", "(unclosed"],
    ),
    "mesh": (
        ["mesh.expert=2", "mesh.data=8", "train.micro_batch=16"],
        ["mesh.data × mesh.expert = 8 × 2 = 16 devices are asked for; found"],
    ),
    "rows on a mesh": (
        ["mesh.expert=3"],
        ["it must be a multiple of mesh.expert × mesh.data = 3 × 1 = 3"],
    ),
    "experts on a mesh": (
        ["mesh.expert=3", "train.micro_batch=3"],
        ["mesh.expert = 3 cannot carry this checkpoint", "4 routed experts cannot be divided"],
    ),
    "sequence too long": (
        ["train.sequence_length=513"],
        ["train.sequence_length is 513; the model has 512 positions"],
    ),
    "override without a value": (
        ["train.steps"],
        ["override 'train.steps': write it as section.field=value"],
    ),
    "override without a section": (
        ["steps=3"],
        ["override 'steps=3': write it as section.field=value"],
    ),
    "override is not YAML": (
        ["train.steps=[1"],
        ["override 'train.steps=[1': the value is not readable as YAML"],
    ),
    "preview of nothing": (["--preview", "0"], ["--preview 0: required: at least 1"]),
    "preview of words": (["--preview", "few"], ["argument --preview: invalid int value: 'few'"]),
}

FILES = {
    "not YAML": ("train: [1, 2", ["not readable as YAML", "line 1"]),
    "a list": (
        "- run\n- model\n",
        ["found list, required sections: run, model, lora, data, train"],
    ),
    "nothing": ("", ["found NoneType, required sections"]),
    "a key twice": (
        "run: {dir: a, seed: 1, dir: b}",
        ["the key 'dir' stands twice", "line 1, column 24"],
    ),
    "a section missing": (
        "run: {dir: a, seed: 1}\nmodel: {checkpoint: demo}\n",
        ["lora: missing; a run must decide it", "data: missing", "train: missing", "3 problems"],
    ),
    "a section that is none": ("run: 3\n", ["run: Input should be a valid dictionary"]),
    "not text": (b"\xff\xfe\x00", ["not readable as YAML"]),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides(training_refused, name):
    overrides, required = OVERRIDES[name]
    message = training_refused(*overrides)
    for part in required:
        assert part in message


@pytest.mark.parametrize("name", FILES)
def test_files(place, training_refused, name):
    content, required = FILES[name]
    place.config.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = training_refused()
    assert str(place.config) in message
    for part in required:
        assert part in message


def test_a_file_that_is_not_there(place, refused):
    message = refused(train, "--config", place.folder / "absent.yaml")
    assert "absent.yaml: no such configuration file; pass --config with a YAML file" in message


def test_no_file_at_all(refused):
    assert "the following arguments are required: --config" in refused(train)


def test_an_override_of_what_is_no_section(place, training_refused):
    place.settings["train"] = "fast"
    place.write_settings()
    assert "override 'train.steps=3': train is not a section" in training_refused("train.steps=3")
